//! The Python face: argument conversion, the GIL, exceptions. No algorithm lives here.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyInt, PyList, PyString, PyTuple};

use crate::encoding::{Specials, check_names};
use crate::error::{Error, Result};
use crate::{Encoding, PRESETS, Pattern, TieBreak, Trainer, Vocab, all_cores, check_sizes, file};

/// Below this many bytes, letting other threads run costs more than it gives.
const DETACH_BYTES: usize = 1 << 14;
/// Texts wait until this many bytes are there to be counted together.
const BATCH_BYTES: usize = 1 << 23;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(path, io) => match io.raw_os_error() {
                // With the number, Python picks FileNotFoundError and its siblings.
                Some(number) => PyOSError::new_err((number, error_text(&io), path.display().to_string())),
                None => PyOSError::new_err(format!("{}: {io}", path.display())),
            },
            other => PyValueError::new_err(other.to_string()),
        }
    }
}

fn error_text(io: &std::io::Error) -> String {
    let text = io.to_string();
    text.split(" (os error").next().map_or_else(String::new, str::to_string)
}

/// A `str` without a copy. Lone surrogates, which UTF-8 cannot hold, become U+FFFD and pairs are joined.
fn text_of(text: &Bound<'_, PyString>) -> PyResult<PyBackedStr> {
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

fn texts_of(texts: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<PyBackedStr>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!("{argument}: expected a list of str, found one str")));
    }
    let one = |(i, item): (usize, PyResult<Bound<'_, PyAny>>)| text_at(&item?, argument, i);
    texts.try_iter()?.enumerate().map(one).collect()
}

fn text_at(item: &Bound<'_, PyAny>, argument: &str, i: usize) -> PyResult<PyBackedStr> {
    match item.cast::<PyString>() {
        Ok(text) => text_of(text),
        Err(_) => {
            Err(PyTypeError::new_err(format!("{argument}[{i}]: expected str, found {}", item.get_type().name()?)))
        }
    }
}

/// Ids from a list, a tuple, any iterable of integers, or a one-dimensional integer buffer (numpy).
fn ids_of(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let mut out = Vec::new();
    if let Ok(list) = ids.cast::<PyList>() {
        out.reserve(list.len());
        for (i, item) in list.iter().enumerate() {
            out.push(id_of(&item, i)?);
        }
    } else if let Some(buffer) = ids_of_buffer::<u32>(ids)? {
        out = buffer;
    } else if let Some(buffer) = ids_of_buffer::<i64>(ids)? {
        for (i, id) in buffer.into_iter().enumerate() {
            let wrong = |_| PyValueError::new_err(format!("ids[{i}]: {id} is not a token id"));
            out.push(u32::try_from(id).map_err(wrong)?);
        }
    } else {
        for (i, item) in ids.try_iter()?.enumerate() {
            out.push(id_of(&item?, i)?);
        }
    }
    Ok(out)
}

/// The numbers of a one-dimensional buffer of `T`, `None` for anything else.
fn ids_of_buffer<T: pyo3::buffer::Element>(ids: &Bound<'_, PyAny>) -> PyResult<Option<Vec<T>>> {
    let Ok(buffer) = PyBuffer::<T>::get(ids) else { return Ok(None) };
    if buffer.dimensions() != 1 {
        return Err(PyValueError::new_err(format!("ids: {} dimensions, 1 expected", buffer.dimensions())));
    }
    buffer.to_vec(ids.py()).map(Some)
}

#[inline]
fn id_of(item: &Bound<'_, PyAny>, i: usize) -> PyResult<u32> {
    item.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyTypeError>(item.py()) {
            return PyTypeError::new_err(format!("ids[{i}]: {}", error.value(item.py())));
        }
        PyValueError::new_err(format!("ids[{i}]: {item} is not a token id"))
    })
}

fn threads_of(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(PyValueError::new_err("threads: 0 should be at least 1, or None for all cores")),
        Some(threads) => Ok(threads),
        None => Ok(all_cores()),
    }
}

/// `"all"` or a collection of names.
fn specials_of(choice: Option<&Bound<'_, PyAny>>, argument: &str, absent: Specials) -> PyResult<Specials> {
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

fn names_of(names: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<String>> {
    Ok(texts_of(names, argument)?.iter().map(|name| name.to_string()).collect())
}

/// An immutable byte-level BPE encoding.
#[pyclass(name = "Encoding", module = "ghostvis_bpe", frozen)]
struct PyEncoding {
    inner: Encoding,
    /// How many ids went into lists so far.
    listed: AtomicUsize,
    /// Python's integer of each id: handing one out takes half the time of making one.
    integers: PyOnceLock<Vec<Py<PyInt>>>,
}

impl From<Encoding> for PyEncoding {
    fn from(inner: Encoding) -> Self {
        Self { inner, listed: AtomicUsize::new(0), integers: PyOnceLock::new() }
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
    fn _from_rank_file(
        path: PathBuf,
        pattern: &str,
        special_tokens: Option<std::collections::HashMap<String, u32>>,
    ) -> PyResult<Self> {
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
        Ok((array_of(py, &ids, "u4")?, array_of(py, &[offsets.as_slice()], "i8")?))
    }

    fn encode_to_numpy<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        self.with_ids(py, text, |ids| array_of(py, &[ids], "u4"))?
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
        let size = self.inner.vocab_size() as usize;
        if self.listed.fetch_add(ids.len(), Ordering::Relaxed) < size {
            return PyList::new(py, ids);
        }
        let make = || (0..size).map(|id| Ok(id.into_pyobject(py)?.unbind())).collect::<PyResult<Vec<_>>>();
        let integers = self.integers.get_or_try_init(py, make)?;
        PyList::new(py, ids.iter().map(|&id| integers[id as usize].bind_borrowed(py)))
    }
}

/// The parts, joined, as a numpy array of `dtype`, which is theirs. A bytearray lies under it, so it is writable.
fn array_of<'py, T: Copy>(py: Python<'py>, parts: &[&[T]], dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    static FROM_BUFFER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let from_buffer =
        FROM_BUFFER.get_or_try_init(py, || Ok::<_, PyErr>(py.import("numpy")?.getattr("frombuffer")?.unbind()))?;
    let bytes: usize = parts.iter().map(|part| size_of_val(*part)).sum();
    let buffer = PyByteArray::new_with(py, bytes, |mut rest| {
        for part in parts {
            // SAFETY: `T` is u32 or i64, which have no padding, so their memory is initialised bytes.
            let raw = unsafe { std::slice::from_raw_parts(part.as_ptr().cast::<u8>(), size_of_val(*part)) };
            let (own, others) = rest.split_at_mut(raw.len());
            own.copy_from_slice(raw);
            rest = others;
        }
        Ok(())
    })?;
    from_buffer.bind(py).call1((buffer, dtype))
}

fn rank_of(rank: &Bound<'_, PyAny>, argument: &str, key: &Bound<'_, PyAny>) -> PyResult<u32> {
    match rank.extract() {
        Ok(rank) => Ok(rank),
        Err(_) => {
            Err(PyValueError::new_err(format!("{argument}[{}]: {} is not a token id", key.repr()?, rank.repr()?)))
        }
    }
}

fn maybe_detach<T: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce() -> T + Send) -> T {
    if bytes < DETACH_BYTES { work() } else { py.detach(work) }
}

/// Calls Python's progress function, and lets Ctrl-C through, at most every `PROGRESS_EVERY`.
struct Progress {
    function: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    fn tell(&mut self, py: Python<'_>, phase: &str, done: usize, total: Option<usize>, always: bool) -> PyResult<()> {
        if !always && self.last.elapsed() < PROGRESS_EVERY {
            return Ok(());
        }
        self.last = Instant::now();
        py.check_signals()?;
        match &self.function {
            Some(function) => function.call1(py, (phase, done, total)).map(|_| ()),
            None => Ok(()),
        }
    }
}

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the arguments of Python's `train`, which names them")]
fn _train(
    texts: &Bound<'_, PyAny>,
    vocab_size: i64,
    pattern: &str,
    special_tokens: &Bound<'_, PyAny>,
    min_frequency: i64,
    threads: Option<usize>,
    tie_break: &str,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<PyEncoding> {
    let py = texts.py();
    let specials = names_of(special_tokens, "special_tokens")?;
    let size = usize::try_from(vocab_size).unwrap_or(0);
    check_sizes(size, specials.len(), min_frequency)?;
    check_names(specials.iter().map(String::as_str))?;
    let pattern = Pattern::new(pattern)?;
    let tie_break = match tie_break {
        "bytes" => TieBreak::Bytes,
        "hf" => TieBreak::HuggingFace,
        _ => return Err(PyValueError::new_err(format!("tie_break: {tie_break:?} should be \"bytes\" or \"hf\""))),
    };
    let mut trainer = Trainer::new(pattern.clone(), threads_of(threads)?).with_tie_break(tie_break);
    let mut progress = Progress { function: on_progress, last: Instant::now() };

    let mut batch: Vec<PyBackedStr> = Vec::new();
    let (mut batch_bytes, mut bytes) = (0, 0);
    for (i, item) in texts.try_iter()?.enumerate() {
        let text = text_at(&item?, "texts", i)?;
        batch_bytes += text.len();
        bytes += text.len();
        batch.push(text);
        if batch_bytes >= BATCH_BYTES {
            py.detach(|| trainer.feed(&batch))?;
            batch.clear();
            batch_bytes = 0;
        }
        progress.tell(py, "read", bytes, None, false)?;
    }
    py.detach(|| trainer.feed(&batch))?;
    drop(batch);
    progress.tell(py, "read", bytes, None, true)?;

    let wanted = size - 256 - specials.len();
    let mut interrupted = None;
    let learned = py.detach(|| {
        trainer.finish(wanted, min_frequency, |done| {
            if done < wanted && progress.last.elapsed() < PROGRESS_EVERY {
                return Ok(());
            }
            Python::attach(|py| progress.tell(py, "merge", done, Some(wanted), true)).map_err(|error| {
                interrupted = Some(error);
                Error::Stopped
            })
        })
    });
    if let Some(error) = interrupted {
        return Err(error);
    }
    let merges = learned?;
    let bytes = tie_break.bytes();
    let first_special = 256 + merges.len() as u32;
    let specials = specials.into_iter().zip(first_special..).collect();
    Ok(Encoding::new(Vocab::from_merges(&bytes, &merges)?, pattern, specials)?.into())
}

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let patterns = PyDict::new(module.py());
    PRESETS.iter().try_for_each(|(name, regex)| patterns.set_item(name, regex))?;
    module.add("PATTERNS", patterns)?;
    module.add_class::<PyEncoding>()?;
    module.add_function(wrap_pyfunction!(_train, module)?)
}
