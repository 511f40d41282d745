//! What `ghostvis_bpe.train` calls: documents in batches, progress, Ctrl-C.

use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::arguments::{Document, document_at, names_of, threads_of};
use super::encoding::PyEncoding;
use crate::encoding::check_names;
use crate::error::Error;
use crate::{Encoding, Pattern, TieBreak, Trainer, Vocab, check_sizes};

/// Texts wait until this many bytes are there to be counted together.
const BATCH_BYTES: usize = 1 << 23;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Calls Python's progress function, and lets Ctrl-C through, at most every `PROGRESS_EVERY`.
pub(super) struct Progress {
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
pub(super) fn _train(
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

    let mut batch: Vec<Document> = Vec::new();
    let (mut batch_bytes, mut bytes) = (0, 0);
    for (i, item) in texts.try_iter()?.enumerate() {
        let text = document_at(&item?, "texts", i)?;
        batch_bytes += text.as_ref().len();
        bytes += text.as_ref().len();
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
