//! From a piece to ids: merge the pair of lowest rank, leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::cache::{Cache, INLINE};
use crate::chunk::{CHUNK, Chunk};
use crate::vocab::{NONE, Vocab};

/// Up to this many bytes looking at all ranks is the fastest way to the lowest; beyond, tokens are found from left to
/// right (`Prefixes`), or by a heap where the vocabulary was not made by merging alone.
const SCAN_BYTES: usize = 48;

/// From this many merged pieces on, the tables of `Prefixes` (50 ms for 100,000 tokens) pay for short pieces too.
const MANY: usize = 4096;

/// Buffers that outlive a text, and a cache of pieces met before (`Cache` says how large it may become).
/// `limit` hides the tokens from that id on (to find what a token is made of).
#[derive(Debug)]
pub struct Scratch {
    limit: u32,
    ids: Vec<u32>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
    failed: Vec<u64>,
    chunk: Chunk,
    cache: Cache,
    /// The vocabulary that the cache belongs to.
    owner: u64,
    lent: Vec<u32>,
    /// How many pieces were no token.
    merged: usize,
}

/// A lent buffer that grew beyond this many ids is not kept.
const KEEP_IDS: usize = 1 << 18;

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
            failed: Vec::new(),
            chunk: Chunk::default(),
            cache: Cache::default(),
            owner: 0,
            lent: Vec::new(),
            merged: 0,
        }
    }

    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    #[inline(always)]
    fn allowed(&self, id: u32) -> u32 {
        if id < self.limit { id } else { NONE }
    }

    /// An empty buffer for ids, with the memory of the last one that `give_ids` got.
    pub fn take_ids(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.lent)
    }

    pub fn give_ids(&mut self, mut ids: Vec<u32>) {
        if ids.capacity() <= KEEP_IDS {
            ids.clear();
            self.lent = ids;
        }
    }

    /// To be called before the first `push` of a text.
    pub fn begin(&mut self, vocab: &Vocab) {
        if self.owner != vocab.instance() {
            self.cache.clear();
            self.owner = vocab.instance();
        }
        self.cache.prepare();
        self.chunk.clear();
    }

    /// Takes the piece `text[start..start + len]`; its ids may reach `out` at a later `push` or at `finish`.
    #[inline(always)]
    pub fn push(&mut self, vocab: &Vocab, text: &[u8], start: usize, len: usize, out: &mut Vec<u32>) {
        let cache = &self.cache;
        if self.chunk.push(text, start, len, |hash| cache.place(hash)) {
            self.finish(vocab, text, out);
        }
    }

    /// Appends the ids of the pieces that `push` kept back.
    #[inline(never)]
    pub fn finish(&mut self, vocab: &Vocab, text: &[u8], out: &mut Vec<u32>) {
        // Ids gather here, so that a hit is a fixed store and an addition.
        let mut ready = [0u32; CHUNK * INLINE];
        let mut count = 0;
        for i in 0..self.chunk.len() {
            let item = &self.chunk.item(i);
            let known = if item.key == 0 { None } else { self.cache.get(item) };
            if let Some(packed) = known
                && packed.len() > 0
            {
                ready[count..count + INLINE].copy_from_slice(&packed.ids());
                count += packed.len();
                continue;
            }
            out.extend_from_slice(&ready[..count]);
            count = 0;
            let piece = &text[item.start as usize..(item.start + item.len) as usize];
            if item.key == 0 || known.is_some() {
                self.kept_piece(vocab, piece, out);
                continue;
            }
            let first = out.len();
            self.piece(vocab, piece, out);
            // No ids: they are many, and kept with those of long pieces when the piece comes again.
            let ids = if out.len() - first <= INLINE { &out[first..] } else { &[] };
            self.cache.put(item, ids);
        }
        out.extend_from_slice(&ready[..count]);
        self.chunk.clear();
    }

    /// A piece that is too long for a key, or has too many ids for an entry.
    fn kept_piece(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        let Some(hash) = Cache::long_hash(piece) else { return self.piece(vocab, piece, out) };
        if let Some(ids) = self.cache.get_long(piece, hash) {
            out.extend_from_slice(ids);
            return;
        }
        let first = out.len();
        self.piece(vocab, piece, out);
        self.cache.put_long(piece, hash, &out[first..]);
    }

    /// Appends the ids of one piece of the split text.
    fn piece(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        if let [byte] = piece {
            out.push(vocab.byte_id(*byte));
            return;
        }
        // A piece that is a token is found by the first look of `encode` too.
        if (self.merged >= MANY || piece.len() > SCAN_BYTES)
            && let Some(prefixes) = vocab.prefixes()
        {
            prefixes.encode(vocab, piece, &mut self.failed, out);
        } else if let Some(id) = vocab.id(piece) {
            out.push(id);
        } else {
            self.merged += 1;
            self.merge(vocab, piece, out);
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
