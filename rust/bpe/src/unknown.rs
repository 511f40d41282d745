//! The pieces of a chunk that the cache does not know, and their ids once they are merged.

use crate::chunk::Item;
use crate::lanes::Work;

/// A piece and where its ids lie among those put aside; nowhere yet where `from` is `to`.
#[derive(Debug, Clone, Copy)]
pub struct Unknown {
    pub item: Item,
    pub from: u32,
    pub to: u32,
}

impl Unknown {
    pub fn new(item: Item) -> Self {
        Self { item, from: 0, to: 0 }
    }
}

/// Those without ids that have some number of bytes.
pub struct ToMerge<'a> {
    pub text: &'a [u8],
    pub pieces: &'a mut [Unknown],
    pub lengths: std::ops::RangeInclusive<usize>,
    /// Tokens from this id on are hidden.
    pub limit: u32,
    pub aside: &'a mut Vec<u32>,
    /// The next to look at.
    pub next: usize,
}

impl Work for ToMerge<'_> {
    #[inline(always)]
    fn next(&mut self) -> Option<(usize, &[u8], u32)> {
        loop {
            let number = self.next;
            let Unknown { item, from, to } = *self.pieces.get(number)?;
            self.next += 1;
            if from == to && self.lengths.contains(&(item.len as usize)) {
                return Some((number, item.bytes(self.text), self.limit));
            }
        }
    }

    #[inline(always)]
    fn done(&mut self, number: usize, ids: &[u32]) {
        self.pieces[number].from = self.aside.len() as u32;
        self.aside.extend_from_slice(ids);
        self.pieces[number].to = self.aside.len() as u32;
    }
}
