//! Python's arguments as ours: texts, names, numbers. A wrong one is an error that names its place.

use std::collections::HashSet;

use pyo3::exceptions::{PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::PyString;

use crate::all_cores;
use crate::encoding::Specials;

/// A `str` without a copy. Lone surrogates, which UTF-8 cannot hold, become U+FFFD and pairs are joined.
pub(super) fn text_of(text: &Bound<'_, PyString>) -> PyResult<PyBackedStr> {
    let py = text.py();
    match PyBackedStr::try_from(text.clone()) {
        Ok(text) => Ok(text),
        Err(error) if error.is_instance_of::<PyUnicodeEncodeError>(py) => {
            let utf16 = text.call_method1("encode", ("utf-16-le", "surrogatepass"))?;
            let repaired = utf16.call_method1("decode", ("utf-16-le", "replace"))?;
            PyBackedStr::try_from(repaired.cast_into::<PyString>()?)
        }
        Err(error) => Err(error),
    }
}

pub(super) fn texts_of(texts: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<PyBackedStr>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!("{argument}: expected a list of str, found one str")));
    }
    let one = |(i, item): (usize, PyResult<Bound<'_, PyAny>>)| text_at(&item?, argument, i);
    texts.try_iter()?.enumerate().map(one).collect()
}

/// A text to be trained on. What is not ASCII is copied: Python would keep the UTF-8 of a `str` as long as the `str`, and
/// who holds a list of texts would hold them twice.
pub(super) enum Document {
    Shared(PyBackedStr),
    Copied(PyBackedBytes),
}

impl AsRef<str> for Document {
    fn as_ref(&self) -> &str {
        match self {
            Document::Shared(text) => text,
            // SAFETY: `document_at` puts nothing here but what `PyUnicode_AsUTF8String` gave.
            Document::Copied(bytes) => unsafe { std::str::from_utf8_unchecked(bytes) },
        }
    }
}

/// `text_at` for training. A `str` with lone surrogates goes its way, as UTF-8 cannot hold it.
pub(super) fn document_at(item: &Bound<'_, PyAny>, argument: &str, i: usize) -> PyResult<Document> {
    if let Ok(text) = item.cast::<PyString>()
        && !text.call_method0(intern!(item.py(), "isascii"))?.is_truthy()?
        && let Ok(bytes) = text.encode_utf8()
    {
        return Ok(Document::Copied(bytes.into()));
    }
    text_at(item, argument, i).map(Document::Shared)
}

pub(super) fn text_at(item: &Bound<'_, PyAny>, argument: &str, i: usize) -> PyResult<PyBackedStr> {
    match item.cast::<PyString>() {
        Ok(text) => text_of(text),
        Err(_) => {
            Err(PyTypeError::new_err(format!("{argument}[{i}]: expected str, found {}", item.get_type().name()?)))
        }
    }
}

pub(super) fn threads_of(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(PyValueError::new_err("threads: 0 should be at least 1, or None for all cores")),
        Some(threads) => Ok(threads),
        None => Ok(all_cores()),
    }
}

/// `"all"` or a collection of names.
pub(super) fn specials_of(choice: Option<&Bound<'_, PyAny>>, argument: &str, absent: Specials) -> PyResult<Specials> {
    let Some(choice) = choice else { return Ok(absent) };
    if let Ok(text) = choice.cast::<PyString>() {
        if text == "all" {
            return Ok(Specials::All);
        }
        return Err(PyValueError::new_err(format!("{argument}: {text:?} should be \"all\" or a set of names")));
    }
    let names: PyResult<HashSet<String>> = choice.try_iter()?.map(|name| name?.extract()).collect();
    Ok(Specials::Only(names?))
}

pub(super) fn names_of(names: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<String>> {
    Ok(texts_of(names, argument)?.iter().map(|name| name.to_string()).collect())
}

pub(super) fn rank_of(rank: &Bound<'_, PyAny>, argument: &str, key: &Bound<'_, PyAny>) -> PyResult<u32> {
    match rank.extract() {
        Ok(rank) => Ok(rank),
        Err(_) => {
            Err(PyValueError::new_err(format!("{argument}[{}]: {} is not a token id", key.repr()?, rank.repr()?)))
        }
    }
}
