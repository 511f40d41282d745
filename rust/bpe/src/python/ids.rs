//! Token ids in and out of Python: lists, buffers, numpy arrays.

use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyInt, PyList, PyTuple};

use crate::runs::prefetch_at;

/// Ids from a list, a tuple, any iterable of integers, or a one-dimensional integer buffer (numpy).
pub(super) fn ids_of(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if let Ok(list) = ids.cast::<PyList>() {
        // A tuple cannot change, so its items are borrowed: two calls for each instead of six.
        return ids_of_tuple(&list.to_tuple());
    }
    if let Ok(tuple) = ids.cast::<PyTuple>() {
        return ids_of_tuple(tuple);
    }
    if let Some(buffer) = ids_of_buffer::<u32>(ids)? {
        return Ok(buffer);
    }
    if let Some(buffer) = ids_of_buffer::<i64>(ids)? {
        let wrong = |i, id| PyValueError::new_err(format!("ids[{i}]: {id} is not a token id"));
        return buffer.iter().enumerate().map(|(i, &id)| u32::try_from(id).map_err(|_| wrong(i, id))).collect();
    }
    ids.try_iter()?.enumerate().map(|(i, item)| id_of(item?.as_borrowed(), i)).collect()
}

fn ids_of_tuple(ids: &Bound<'_, PyTuple>) -> PyResult<Vec<u32>> {
    let mut out = Vec::with_capacity(ids.len());
    for (i, item) in ids.iter_borrowed().enumerate() {
        out.push(id_of(item, i)?);
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

#[inline(always)]
fn id_of(item: Borrowed<'_, '_, PyAny>, i: usize) -> PyResult<u32> {
    if item.is_exact_instance_of::<PyInt>() {
        // SAFETY: `item` is an int. A number that fits nowhere gives -1 and sets an error, which is taken.
        let number = unsafe { ffi::PyLong_AsLong(item.as_ptr()) };
        if let Ok(id) = u32::try_from(number) {
            return Ok(id);
        }
        let _ = PyErr::take(item.py());
    }
    unusual_id_of(item, i)
}

/// Numpy's integers, `bool`, and what is no id.
#[cold]
fn unusual_id_of(item: Borrowed<'_, '_, PyAny>, i: usize) -> PyResult<u32> {
    item.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyTypeError>(item.py()) {
            return PyTypeError::new_err(format!("ids[{i}]: {}", error.value(item.py())));
        }
        PyValueError::new_err(format!("ids[{i}]: {} is not a token id", &*item))
    })
}

/// How many integers ahead one is asked for.
const AHEAD: usize = 32;

/// Python's integer of each id: handing one out takes half the time of making one.
#[derive(Default)]
pub(super) struct Integers {
    /// How many ids went into lists so far.
    listed: AtomicUsize,
    made: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Integers {
    /// A list of `ids`, which are below `size`. The integers are made once that many were asked for.
    pub(super) fn list<'py>(&self, py: Python<'py>, ids: &[u32], size: u32) -> PyResult<Bound<'py, PyList>> {
        if self.listed.fetch_add(ids.len(), Ordering::Relaxed) < size as usize {
            return PyList::new(py, ids);
        }
        let make = || (0..size).map(|id| Ok(id.into_pyobject(py)?.unbind())).collect::<PyResult<Vec<_>>>();
        let integers = self.made.get_or_try_init(py, make)?;
        let address = |&id: &u32| integers[id as usize].as_ptr();
        // SAFETY: the list has room for as many as `ids` has and takes over the reference that each integer gains.
        unsafe {
            let list = Bound::from_owned_ptr_or_err(py, ffi::PyList_New(ids.len() as ffi::Py_ssize_t))?;
            for (i, id) in ids.iter().enumerate() {
                // The integers are more than the second cache holds.
                if let Some(ahead) = ids.get(i + AHEAD) {
                    prefetch_at(address(ahead));
                }
                let integer = address(id);
                ffi::Py_INCREF(integer);
                ffi::PyList_SetItem(list.as_ptr(), i as ffi::Py_ssize_t, integer);
            }
            Ok(list.cast_into_unchecked())
        }
    }
}

/// The parts, joined, as a numpy array of `dtype`, which is theirs. A bytearray lies under it, so it is writable.
pub(super) fn array_of<'py, T: Copy>(py: Python<'py>, parts: &[&[T]], dtype: &str) -> PyResult<Bound<'py, PyAny>> {
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
