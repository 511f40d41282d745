//! From a piece to ids: merge the pair of lowest rank, leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::vocab::{NONE, Vocab};

/// Above this many bytes a heap finds the lowest rank; below, looking at all of them is faster.
const SCAN_BYTES: usize = 64;

/// Buffers that outlive a piece. `limit` hides the tokens from that id on (to find what a token is made of).
#[derive(Debug)]
pub struct Scratch {
    limit: u32,
    ids: Vec<u32>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::with_limit(NONE)
    }
}

impl Scratch {
    pub fn with_limit(limit: u32) -> Self {
        Self {
            limit,
            ids: Vec::new(),
            ranks: Vec::new(),
            next: Vec::new(),
            previous: Vec::new(),
            heap: BinaryHeap::new(),
        }
    }

    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    #[inline(always)]
    fn allowed(&self, id: u32) -> u32 {
        if id < self.limit { id } else { NONE }
    }

    /// Appends the ids of one piece of the split text.
    #[inline]
    pub fn piece(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        if let [byte] = piece {
            out.push(vocab.byte_id(*byte));
            return;
        }
        match vocab.id(piece) {
            Some(id) => out.push(id),
            None => self.merge(vocab, piece, out),
        }
    }

    /// Appends the ids of `piece` by merging alone, without asking whether the piece is a token.
    pub fn merge(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        self.start(vocab, piece);
        if piece.len() <= SCAN_BYTES {
            self.merge_by_scan(vocab);
            out.extend_from_slice(&self.ids);
        } else {
            self.merge_by_heap(vocab);
            let mut at = 0;
            while at < self.ids.len() {
                out.push(self.ids[at]);
                at = self.next[at] as usize;
            }
        }
    }

    /// One id per byte; `ranks[i]` is the id that `i` and its right neighbour would make.
    fn start(&mut self, vocab: &Vocab, piece: &[u8]) {
        self.ids.clear();
        self.ids.extend(piece.iter().map(|&b| vocab.byte_id(b)));
        self.ranks.clear();
        let limit = self.limit;
        self.ranks.extend(piece.windows(2).map(|w| {
            let id = vocab.byte_pair(w[0], w[1]);
            if id < limit { id } else { NONE }
        }));
        self.ranks.push(NONE);
    }

    fn merge_by_scan(&mut self, vocab: &Vocab) {
        loop {
            let (mut at, mut lowest) = (0, NONE);
            for (i, &rank) in self.ranks.iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NONE {
                return;
            }
            self.ids[at] = lowest;
            self.ids.remove(at + 1);
            self.ranks.remove(at + 1);
            if at + 1 < self.ids.len() {
                self.ranks[at] = self.allowed(vocab.pair(lowest, self.ids[at + 1]));
            } else {
                self.ranks[at] = NONE;
            }
            if at > 0 {
                self.ranks[at - 1] = self.allowed(vocab.pair(self.ids[at - 1], lowest));
            }
        }
    }

    /// n log n: a heap of (rank, position) over a doubly linked list; an entry whose rank has changed is skipped.
    fn merge_by_heap(&mut self, vocab: &Vocab) {
        let len = u32::try_from(self.ids.len()).expect("a piece of 4 GB is refused before it comes here");
        self.next.clear();
        self.next.extend(1..=len);
        self.previous.clear();
        self.previous.extend((0..len).map(|i| i.wrapping_sub(1)));
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        entries.extend((0u32..).zip(&self.ranks).filter(|(_, rank)| **rank != NONE).map(|(i, &r)| Reverse((r, i))));
        self.heap = BinaryHeap::from(entries);
        while let Some(Reverse((rank, at))) = self.heap.pop() {
            let i = at as usize;
            if self.ranks[i] != rank {
                continue;
            }
            let gone = self.next[i] as usize;
            self.ids[i] = rank;
            self.ranks[gone] = NONE;
            let after = self.next[gone];
            self.next[i] = after;
            self.ranks[i] = NONE;
            if after < len {
                self.previous[after as usize] = at;
                self.rank_again(vocab, at, after);
            }
            let before = self.previous[i];
            if before != NONE {
                self.rank_again(vocab, before, at);
            }
        }
    }

    fn rank_again(&mut self, vocab: &Vocab, left: u32, right: u32) {
        let rank = self.allowed(vocab.pair(self.ids[left as usize], self.ids[right as usize]));
        self.ranks[left as usize] = rank;
        if rank != NONE {
            self.heap.push(Reverse((rank, left)));
        }
    }
}
