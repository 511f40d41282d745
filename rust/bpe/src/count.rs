//! Counts of the distinct pieces of a corpus; memory grows with the distinct pieces, not with the corpus.

use std::hash::Hasher;

use hashbrown::HashTable;
use rustc_hash::FxHasher;

#[derive(Debug, Clone, Copy)]
struct Entry {
    start: usize,
    len: usize,
    count: i64,
}

#[derive(Debug, Default)]
pub struct PieceCounts {
    table: HashTable<u32>,
    entries: Vec<Entry>,
    arena: Vec<u8>,
}

pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

impl PieceCounts {
    pub fn add(&mut self, piece: &[u8], count: i64) {
        let Self { table, entries, arena } = self;
        let bytes = |e: &Entry| e.start..e.start + e.len;
        let hash = hash_bytes(piece);
        if let Some(&found) = table.find(hash, |&i| &arena[bytes(&entries[i as usize])] == piece) {
            entries[found as usize].count += count;
            return;
        }
        let index = u32::try_from(entries.len()).expect("fewer than 4 billion distinct pieces fit in memory");
        entries.push(Entry { start: arena.len(), len: piece.len(), count });
        arena.extend_from_slice(piece);
        table.insert_unique(hash, index, |&i| hash_bytes(&arena[bytes(&entries[i as usize])]));
    }

    pub fn merge(&mut self, other: &Self) {
        for (piece, count) in other.iter() {
            self.add(piece, count);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], i64)> {
        self.entries.iter().map(|e| (&self.arena[e.start..e.start + e.len], e.count))
    }

    /// Bytes of the distinct pieces and a border after each.
    pub fn cells(&self) -> usize {
        self.arena.len() + self.entries.len()
    }
}
