//! `ghostvis_bpe.Encoding`.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use super::arguments::{names_of, rank_of, specials_of, text_of, texts_of, threads_of};
use super::ids::{array_of, ids_of};
use super::integers::Integers;
use crate::encoding::Specials;
use crate::error::{Error, Result};
use crate::{Encoding, Pattern, Vocab, file};

/// Below this many bytes, letting other threads run costs more than it gives.
const DETACH_BYTES: usize = 1 << 14;

/// An immutable byte-level BPE encoding.
#[pyclass(name = "Encoding", module = "ghostvis_bpe", frozen)]
pub(super) struct PyEncoding {
    inner: Encoding,
    integers: Integers,
}

impl From<Encoding> for PyEncoding {
    fn from(inner: Encoding) -> Self {
        Self { inner, integers: Integers::default() }
    }
}

#[pymethods]
impl PyEncoding {
    #[new]
    #[pyo3(signature = (ranks, pattern = "ghostvis", special_tokens = None, normalizer = None))]
    fn new(
        ranks: &Bound<'_, PyDict>,
        pattern: &str,
        special_tokens: Option<&Bound<'_, PyDict>>,
        normalizer: Option<&str>,
    ) -> PyResult<Self> {
        let mut tokens: Vec<(Vec<u8>, u32)> = Vec::with_capacity(ranks.len());
        for (token, rank) in ranks.iter() {
            let Ok(bytes) = token.cast::<PyBytes>() else {
                return Err(PyTypeError::new_err(format!("ranks: expected bytes as keys, found {}", token.repr()?)));
            };
            tokens.push((bytes.as_bytes().to_vec(), rank_of(&rank, "ranks", &token)?));
        }
        let mut specials = Vec::new();
        for (name, id) in special_tokens.iter().flat_map(|specials| specials.iter()) {
            specials.push((name.extract()?, rank_of(&id, "special_tokens", &name)?));
        }
        let encoding = Encoding::new(Vocab::new(&tokens)?, Pattern::new(pattern)?, specials)?;
        match normalizer {
            None => Ok(encoding.into()),
            Some("nfc") => Ok(encoding.with_nfc().into()),
            Some(other) => Err(PyValueError::new_err(format!("normalizer: {other:?} should be \"nfc\" or None"))),
        }
    }

    #[staticmethod]
    #[pyo3(signature = (path, pattern, special_tokens = None))]
    fn _from_rank_file(path: PathBuf, pattern: &str, special_tokens: Option<HashMap<String, u32>>) -> PyResult<Self> {
        let specials = special_tokens.unwrap_or_default().into_iter().collect();
        let vocab = Vocab::new(&file::read_ranks(&path)?)
            .map_err(|error| Error::Value(format!("{}: {error}", path.display())))?;
        Ok(Self::from(Encoding::new(vocab, Pattern::new(pattern)?, specials)?))
    }

    fn encode_ordinary<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        self.with_ids(py, text, |ids| self.list(py, ids))?
    }

    #[pyo3(signature = (text, allowed_special = None, disallowed_special = None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
        allowed_special: Option<&Bound<'py, PyAny>>,
        disallowed_special: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let allowed = specials_of(allowed_special, "allowed_special", Specials::Only(HashSet::new()))?;
        let disallowed = specials_of(disallowed_special, "disallowed_special", Specials::All)?;
        let text = text_of(text)?;
        let encode = || -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            self.inner.with_scratch(|scratch| self.inner.encode(&text, &allowed, &disallowed, scratch, &mut ids))?;
            Ok(ids)
        };
        self.list(py, &maybe_detach(py, text.len(), encode)?)
    }

    #[pyo3(signature = (texts, *, threads = None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let texts = texts_of(texts, "texts")?;
        let threads = threads_of(threads)?;
        let shares = py.detach(|| self.inner.encode_flat(&texts, threads))?;
        let mut lists = Vec::with_capacity(texts.len());
        for (ids, ends) in shares {
            let mut start = 0;
            for end in ends {
                lists.push(self.list(py, &ids[start..end])?);
                start = end;
            }
        }
        PyList::new(py, lists)
    }

    #[pyo3(signature = (texts, *, threads = None))]
    fn encode_batch_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let texts = texts_of(texts, "texts")?;
        let threads = threads_of(threads)?;
        let shares = py.detach(|| self.inner.encode_flat(&texts, threads))?;
        let mut before = 0i64;
        let mut offsets = vec![before];
        for (ids, ends) in &shares {
            offsets.extend(ends.iter().map(|&end| before + end as i64));
            before += ids.len() as i64;
        }
        let ids: Vec<&[u32]> = shares.iter().map(|(ids, _)| ids.as_slice()).collect();
        Ok((array_of(py, &ids, "u4", threads)?, array_of(py, &[offsets.as_slice()], "i8", 1)?))
    }

    fn encode_to_numpy<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        self.with_ids(py, text, |ids| array_of(py, &[ids], "u4", 1))?
    }

    fn count(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<usize> {
        self.with_ids(py, text, <[u32]>::len)
    }

    #[pyo3(signature = (ids, errors = "replace"))]
    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>, errors: &str) -> PyResult<Bound<'py, PyString>> {
        if !matches!(errors, "strict" | "replace" | "ignore" | "backslashreplace") {
            return Err(PyValueError::new_err(format!(
                "errors: {errors:?} should be \"replace\", \"strict\", \"ignore\" or \"backslashreplace\""
            )));
        }
        let bytes = self.inner.decode_bytes(&ids_of(ids)?)?;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(PyString::new(py, &text)),
            Err(error) => {
                let bytes = PyBytes::new(py, error.as_bytes());
                Ok(bytes.call_method1("decode", ("utf-8", errors))?.cast_into()?)
            }
        }
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let ids = ids_of(ids)?;
        PyBytes::new_with(py, self.inner.decoded_len(&ids)?, |out| {
            self.inner.decode_into(&ids, out);
            Ok(())
        })
    }

    fn token_bytes<'py>(&self, py: Python<'py>, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let number: u32 = id.extract().map_err(|_| PyValueError::new_err(format!("id: {id} is not a token id")))?;
        match self.inner.token_bytes(number) {
            Some(bytes) => Ok(PyBytes::new(py, bytes)),
            None => Err(PyValueError::new_err(self.inner.no_token(number))),
        }
    }

    #[getter]
    fn vocab_size(&self) -> u32 {
        self.inner.vocab_size()
    }

    #[getter]
    fn pattern(&self) -> &str {
        self.inner.pattern().regex()
    }

    #[getter]
    fn normalizer(&self) -> Option<&'static str> {
        self.inner.nfc().then_some("nfc")
    }

    #[getter]
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        self.inner.specials().iter().try_for_each(|(name, id)| dict.set_item(name, id))?;
        Ok(dict)
    }

    #[getter]
    fn ranks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for id in 0..self.inner.vocab().id_bound() {
            if let Some(token) = self.inner.vocab().bytes(id) {
                dict.set_item(PyBytes::new(py, token), id)?;
            }
        }
        Ok(dict)
    }

    #[getter]
    fn merges(&self) -> PyResult<Vec<(u32, u32)>> {
        Ok(self.inner.merges()?)
    }

    #[getter]
    fn hash(&self) -> &str {
        self.inner.hash()
    }

    fn with_special_tokens(&self, names: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self::from(self.inner.with_special_tokens(names_of(names, "names")?)?))
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| file::save(&self.inner, &path))?)
    }

    fn save_tiktoken(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| file::save_ranks(&self.inner, &path))?)
    }

    fn save_hf(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| file::save_hf(&self.inner, &path))?)
    }

    #[staticmethod]
    fn _load_hf(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::from(py.detach(|| file::load_hf(&path))?))
    }

    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::from(py.detach(|| file::load(&path))?))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, own) = (slf.py(), slf.get());
        let state = (own.ranks(py)?, own.pattern(), own.special_tokens(py)?, own.normalizer());
        Ok((slf.get_type().into_any(), state.into_pyobject(py)?))
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().inner.hash() == self.inner.hash())
    }

    fn __hash__(&self) -> u64 {
        crate::count::hash_bytes(self.inner.hash().as_bytes())
    }

    fn __repr__(&self) -> String {
        format!(
            "Encoding(vocab_size={}, special_tokens={}, hash={:?})",
            self.inner.vocab_size(),
            self.inner.specials().len(),
            &self.inner.hash()[..12]
        )
    }
}

impl PyEncoding {
    /// Calls `use_ids` with the ids of `text`, in a buffer that is used again.
    fn with_ids<T>(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyString>,
        use_ids: impl FnOnce(&[u32]) -> T,
    ) -> PyResult<T> {
        let text = text_of(text)?;
        self.inner.with_scratch(|scratch| {
            let mut ids = scratch.take_ids();
            maybe_detach(py, text.len(), || self.inner.encode_ordinary(&text, scratch, &mut ids))?;
            let result = use_ids(&ids);
            scratch.give_ids(ids);
            Ok(result)
        })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        self.integers.list(py, ids, self.inner.vocab_size())
    }
}

fn maybe_detach<T: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce() -> T + Send) -> T {
    if bytes < DETACH_BYTES { work() } else { py.detach(work) }
}
