//! Counts of the distinct pieces of a corpus; memory grows with the distinct pieces, not with the corpus.
//!
//! Short pieces, nearly all there are, lie in one open-addressing table whose lines are asked for ahead of time.

use std::cmp::Reverse;
use std::hash::Hasher;

use hashbrown::HashTable;
use rustc_hash::FxHasher;

use crate::chunk::{Chunk, Key, hash_of, key_bytes};

/// Key and count. A count of zero is an empty slot.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    low: u64,
    high: u64,
    count: i64,
}

impl Slot {
    #[inline(always)]
    fn is(&self, key: Key) -> bool {
        self.low == key as u64 && self.high == (key >> 64) as u64
    }

    fn key(&self) -> Key {
        u128::from(self.high) << 64 | u128::from(self.low)
    }
}

#[derive(Debug, Clone, Copy)]
struct Long {
    start: usize,
    len: usize,
    count: i64,
}

/// Slots before the first growth; a power of two.
const FIRST_SLOTS: usize = 1 << 12;

#[derive(Debug)]
pub struct PieceCounts {
    slots: Vec<Slot>,
    used: usize,
    /// Bytes of the short pieces.
    bytes: usize,
    chunk: Chunk,
    table: HashTable<u32>,
    long: Vec<Long>,
    arena: Vec<u8>,
}

impl Default for PieceCounts {
    fn default() -> Self {
        Self {
            slots: vec![Slot::default(); FIRST_SLOTS],
            used: 0,
            bytes: 0,
            chunk: Chunk::default(),
            table: HashTable::new(),
            long: Vec::new(),
            arena: Vec::new(),
        }
    }
}

pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

impl PieceCounts {
    /// Counts `text[start..start + len]`, now or at `flush`. A piece of one byte has no pair to merge.
    #[inline(always)]
    pub fn push(&mut self, text: &[u8], start: usize, len: usize) {
        if len == 1 {
            return;
        }
        let slots = &self.slots;
        if self.chunk.push(text, start, len, |hash| &slots[hash as usize & (slots.len() - 1)]) {
            self.flush(text);
        }
    }

    /// Counts the pieces of `text` that `push` kept back.
    #[inline(never)]
    pub fn flush(&mut self, text: &[u8]) {
        for i in 0..self.chunk.len() {
            let item = self.chunk.item(i);
            if item.key != 0 {
                self.add_short(item.key, item.hash, 1);
            } else {
                self.add_long(&text[item.start as usize..(item.start + item.len) as usize], 1);
            }
        }
        self.chunk.clear();
    }

    #[inline(always)]
    fn add_short(&mut self, key: Key, hash: u64, count: i64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = &mut self.slots[at & mask];
            if slot.is(key) {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                *slot = Slot { low: key as u64, high: (key >> 64) as u64, count };
                self.used += 1;
                self.bytes += (key >> 120) as usize;
                if self.used * 3 > self.slots.len() * 2 {
                    self.grow();
                }
                return;
            }
            at += 1;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let mask = self.slots.len() * 2 - 1;
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); mask + 1]);
        for slot in old.into_iter().filter(|slot| slot.count != 0) {
            let mut at = hash_of(slot.key()) as usize & mask;
            while self.slots[at].count != 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = slot;
        }
    }

    fn add_long(&mut self, piece: &[u8], count: i64) {
        let Self { table, long, arena, .. } = self;
        let bytes = |e: &Long| e.start..e.start + e.len;
        let hash = hash_bytes(piece);
        if let Some(&found) = table.find(hash, |&i| &arena[bytes(&long[i as usize])] == piece) {
            long[found as usize].count += count;
            return;
        }
        let index = u32::try_from(long.len()).expect("fewer than 4 billion distinct pieces fit in memory");
        long.push(Long { start: arena.len(), len: piece.len(), count });
        arena.extend_from_slice(piece);
        table.insert_unique(hash, index, |&i| hash_bytes(&arena[bytes(&long[i as usize])]));
    }

    pub fn merge(&mut self, other: &Self) {
        for slot in other.slots.iter().filter(|slot| slot.count != 0) {
            self.add_short(slot.key(), hash_of(slot.key()), slot.count);
        }
        for long in &other.long {
            self.add_long(&other.arena[long.start..long.start + long.len], long.count);
        }
    }

    /// Calls `each` with every distinct piece and its count, the most frequent first.
    ///
    /// The empty slots are given back before: training takes the most memory at this point.
    pub fn each_by_count(mut self, mut each: impl FnMut(&[u8], i64)) {
        self.table = HashTable::new();
        self.slots.retain(|slot| slot.count != 0);
        self.slots.shrink_to_fit();
        self.slots.sort_unstable_by_key(|slot| Reverse(slot.count));
        self.long.sort_unstable_by_key(|long| Reverse(long.count));
        let mut long = self.long.iter().peekable();
        for slot in &self.slots {
            while let Some(long) = long.next_if(|long| long.count > slot.count) {
                each(&self.arena[long.start..long.start + long.len], long.count);
            }
            each(key_bytes(&slot.key().to_le_bytes()), slot.count);
        }
        long.for_each(|long| each(&self.arena[long.start..long.start + long.len], long.count));
    }

    pub fn pieces(&self) -> usize {
        self.used + self.long.len()
    }

    /// Bytes of the distinct pieces and a border after each.
    pub fn cells(&self) -> usize {
        self.bytes + self.arena.len() + self.pieces()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::key_of;

    #[test]
    fn short_and_long_pieces_are_counted_through_every_growth() {
        let mut counts = PieceCounts::default();
        let text: String = (0..20_000).map(|i| format!("{i:02}{}", "x".repeat(i % 40))).collect();
        for _ in 0..2 {
            let mut at = 0;
            for i in 0..20_000 {
                let len = format!("{i:02}").len() + i % 40;
                counts.push(text.as_bytes(), at, len);
                at += len;
            }
            counts.flush(text.as_bytes());
        }
        let mut twice = PieceCounts::default();
        twice.merge(&counts);
        twice.merge(&counts);
        assert_eq!((twice.pieces(), twice.cells()), (20_000, text.len() + 20_000));
        let mut pieces = Vec::new();
        twice.each_by_count(|piece, count| {
            assert_eq!(count, 4);
            pieces.push(piece.to_vec());
        });
        let mut expected: Vec<_> = (0..20_000).map(|i| format!("{i:02}{}", "x".repeat(i % 40)).into_bytes()).collect();
        pieces.sort();
        expected.sort();
        assert_eq!(pieces, expected);
        let key = key_of(b"ab", 0, 2);
        assert_eq!(key_bytes(&key.to_le_bytes()), b"ab");
    }

    #[test]
    fn the_most_frequent_piece_comes_first_whatever_its_length() {
        let mut counts = PieceCounts::default();
        let pieces: Vec<String> = (1..40).map(|i| "y".repeat(i % 31 + 2)).collect();
        for (piece, times) in pieces.iter().zip(1..) {
            (0..times).for_each(|_| counts.push(piece.as_bytes(), 0, piece.len()));
            counts.flush(piece.as_bytes());
        }
        let mut found = Vec::new();
        counts.each_by_count(|piece, count| found.push((count, piece.len())));
        assert_eq!(found.len(), 31);
        assert!(found.windows(2).all(|w| w[0].0 >= w[1].0));
        assert!(found.contains(&(1 + 32, 3)) && found.contains(&(31, 2)));
    }
}
