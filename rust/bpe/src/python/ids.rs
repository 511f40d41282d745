//! Token ids in and out of Python: lists, buffers, numpy arrays.

use std::mem::MaybeUninit;
use std::thread;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyInt, PyList, PyTuple};

use crate::memory::ask_for_huge_pages;

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

/// The parts, joined by as many threads, as a numpy array of `dtype`, which is theirs. A bytearray lies under it, so it
/// is writable.
pub(super) fn array_of<'py, T: Copy + Sync>(
    py: Python<'py>,
    parts: &[&[T]],
    dtype: &str,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    static FROM_BUFFER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let from_buffer =
        FROM_BUFFER.get_or_try_init(py, || Ok::<_, PyErr>(py.import("numpy")?.getattr("frombuffer")?.unbind()))?;
    let bytes: usize = parts.iter().map(|part| size_of_val(*part)).sum();
    // SAFETY: without a source the bytes are not initialised; nobody else sees them before `join` has written them all.
    let (buffer, room) = unsafe {
        let buffer = ffi::PyByteArray_FromStringAndSize(std::ptr::null(), bytes as ffi::Py_ssize_t);
        let buffer = Bound::from_owned_ptr_or_err(py, buffer)?;
        let start = ffi::PyByteArray_AsString(buffer.as_ptr()).cast::<MaybeUninit<u8>>();
        (buffer, std::slice::from_raw_parts_mut(start, bytes))
    };
    if bytes < JOIN_BYTES {
        join(parts, room, 1);
    } else {
        py.detach(|| {
            ask_for_huge_pages(room);
            join(parts, room, threads);
        });
    }
    from_buffer.bind(py).call1((buffer, dtype))
}

/// Fewer bytes than this are copied by one thread, before another would have begun.
const JOIN_BYTES: usize = 1 << 20;

/// Copies the parts, one after the other, over `room`, which has their size.
fn join<T: Copy + Sync>(parts: &[&[T]], room: &mut [MaybeUninit<u8>], threads: usize) {
    let goal = room.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let mut shares = room.chunks_mut(goal).enumerate();
        let own = shares.next();
        for (i, share) in shares {
            scope.spawn(move || copy_from(parts, i * goal, share));
        }
        if let Some((_, share)) = own {
            copy_from(parts, 0, share);
        }
    });
}

/// Fills `room` with the bytes of the parts from byte `skip` on.
fn copy_from<T: Copy>(parts: &[&[T]], mut skip: usize, mut room: &mut [MaybeUninit<u8>]) {
    for part in parts {
        // SAFETY: `T` is u32 or i64, which have no padding, so their memory is initialised bytes.
        let raw = unsafe { std::slice::from_raw_parts(part.as_ptr().cast::<u8>(), size_of_val(*part)) };
        let raw = &raw[skip.min(raw.len())..];
        skip -= size_of_val(*part) - raw.len();
        let (own, rest) = room.split_at_mut(raw.len().min(room.len()));
        own.write_copy_of_slice(&raw[..own.len()]);
        room = rest;
    }
}
