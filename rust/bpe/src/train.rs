//! Training: count the distinct pieces, then merge the most frequent pair until the vocabulary is full.
//!
//! The result is a function of the text alone: ties go to the smallest (left id, right id), counts are 64-bit, and
//! neither the number of threads nor the order of the texts matters.

use std::thread;

use crate::count::PieceCounts;
use crate::error::{Error, Result};
use crate::merge::{Merger, check_room};
use crate::split::Pattern;
use crate::threads::split_by_bytes;

/// Ids are u32 and every merge costs memory; no tokenizer in use is near this.
pub const MAX_VOCAB_SIZE: usize = 1 << 24;

/// How bytes are numbered, which decides between pairs of equal count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TieBreak {
    /// A byte is its own id, as in rustbpe.
    #[default]
    Bytes,
    /// As Hugging Face's trainer numbers them: `!` is 0.
    HuggingFace,
}

impl TieBreak {
    /// The byte of each of the first 256 ids.
    pub fn bytes(self) -> [u8; 256] {
        match self {
            TieBreak::Bytes => std::array::from_fn(|i| i as u8),
            TieBreak::HuggingFace => crate::hf::byte_order(),
        }
    }
}

/// Collects the pieces of a corpus in one table per thread.
pub struct Trainer {
    pattern: Pattern,
    tie_break: TieBreak,
    tables: Vec<PieceCounts>,
}

impl Trainer {
    pub fn new(pattern: Pattern, threads: usize) -> Self {
        Self {
            pattern,
            tie_break: TieBreak::default(),
            tables: (0..threads.max(1)).map(|_| PieceCounts::default()).collect(),
        }
    }

    pub fn with_tie_break(mut self, tie_break: TieBreak) -> Self {
        self.tie_break = tie_break;
        self
    }

    /// Counts the pieces of `texts`, each a document of its own.
    pub fn feed<S: AsRef<str> + Sync>(&mut self, texts: &[S]) -> Result<()> {
        let pattern = &self.pattern;
        let shares = split_by_bytes(texts, self.tables.len());
        let work = |table: &mut PieceCounts, share: &[S]| -> Result<()> {
            for text in share {
                let bytes = text.as_ref().as_bytes();
                pattern.split(text.as_ref(), |start, end| table.push(bytes, start, end - start))?;
                table.flush(bytes);
            }
            check_room(table)
        };
        thread::scope(|scope| {
            let mut jobs = self.tables.iter_mut().zip(shares);
            let own = jobs.next();
            let spawned: Vec<_> = jobs
                .filter(|(_, share)| !share.is_empty())
                .map(|(table, share)| scope.spawn(move || work(table, share)))
                .collect();
            let mut result = own.map_or(Ok(()), |(table, share)| work(table, share));
            for job in spawned {
                result = result.and(job.join().expect("counting does not panic"));
            }
            result
        })
    }

    /// Learns at most `merges` merges, as pairs of ids: the first 256 are `TieBreak::bytes`, merge `i` makes id `256 + i`.
    ///
    /// Stops early when no pair occurs `min_frequency` times. `progress` gets the number of merges done, now and
    /// then, and stops the training by returning an error.
    pub fn finish(
        self,
        merges: usize,
        min_frequency: i64,
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<(u32, u32)>> {
        let mut tables = self.tables.into_iter();
        let mut pieces = tables.next().expect("a trainer has a table");
        for table in tables {
            pieces.merge(&table);
        }
        let mut merger = Merger::new(pieces, &self.tie_break.bytes(), min_frequency, merges)?;
        let mut learned = Vec::new();
        while learned.len() < merges {
            if learned.len() % 64 == 0 {
                progress(learned.len())?;
            }
            match merger.step() {
                Some(pair) => learned.push(pair),
                None => break,
            }
        }
        progress(learned.len())?;
        Ok(learned)
    }
}

pub fn check_sizes(vocab_size: usize, special_tokens: usize, min_frequency: i64) -> Result<()> {
    let least = 256 + special_tokens;
    if vocab_size < least || vocab_size > MAX_VOCAB_SIZE {
        return Error::value(format!(
            "vocab_size: {vocab_size} is out of range: it counts the 256 bytes and {special_tokens} special tokens, \
             so at least {least} and at most {MAX_VOCAB_SIZE}"
        ));
    }
    if min_frequency < 1 {
        return Error::value(format!("min_frequency: {min_frequency} should be at least 1"));
    }
    Ok(())
}
