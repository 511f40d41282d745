//! From a piece to ids: merge the pair of lowest rank, leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::backtrack::Steps;
use crate::cache::{Cache, INLINE};
use crate::chunk::{Chunk, Item};
use crate::vocab::{NONE, Vocab};
use crate::{repeat, short};

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
    steps: Steps,
    chunk: Chunk,
    cache: Cache,
    /// The vocabulary that the cache belongs to.
    owner: u64,
    lent: Vec<u32>,
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
            steps: Steps::default(),
            chunk: Chunk::default(),
            cache: Cache::default(),
            owner: 0,
            lent: Vec::new(),
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
            self.steps = Steps::default();
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
        // Room for all hits, so that each is a store of fixed size and an addition.
        let mut end = out.len();
        out.resize(end + self.chunk.len() * INLINE, 0);
        for i in 0..self.chunk.len() {
            let (key, hash) = self.chunk.key(i);
            let known = if key == 0 { None } else { self.cache.get(key, hash) };
            if let Some(packed) = known
                && packed.len() > 0
            {
                out[end..end + INLINE].copy_from_slice(&packed.ids());
                end += packed.len();
                continue;
            }
            out.truncate(end);
            self.unknown(vocab, text, &self.chunk.item(i), known.is_some(), out);
            end = out.len();
            out.resize(end + (self.chunk.len() - i) * INLINE, 0);
        }
        out.truncate(end);
        self.chunk.clear();
    }

    /// `kept`: the piece has too many ids for an entry of its own.
    #[inline(never)]
    fn unknown(&mut self, vocab: &Vocab, text: &[u8], item: &Item, kept: bool, out: &mut Vec<u32>) {
        let piece = &text[item.start as usize..(item.start + item.len) as usize];
        if item.key == 0 || kept {
            return self.kept_piece(vocab, piece, out);
        }
        if let Some(packed) = self.cache.get_beside(item.key, item.hash) {
            if packed.len() == 0 {
                return self.kept_piece(vocab, piece, out);
            }
            return out.extend_from_slice(&packed.ids()[..packed.len()]);
        }
        let first = out.len();
        self.piece(vocab, piece, out);
        // No ids: they are many, and kept with those of long pieces when the piece comes again.
        let ids = if out.len() - first <= INLINE { &out[first..] } else { &[] };
        self.cache.put(item, ids);
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
        if let Some(id) = vocab.id(piece) {
            return out.push(id);
        }
        if piece.len() <= short::MOST {
            return short::merge(vocab, piece, self.limit, out);
        }
        if repeat::merge(vocab, piece, self.limit, out) {
            return;
        }
        // A vocabulary that was not made by merging alone has no prefixes.
        match vocab.prefixes() {
            Some(prefixes) => prefixes.encode(vocab, piece, &mut self.steps, out),
            None => self.merge_by_heap(vocab, piece, out),
        }
    }

    /// Appends the ids of `piece` by merging alone, without asking whether the piece is a token.
    pub fn merge(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() <= short::MOST {
            short::merge(vocab, piece, self.limit, out);
        } else if !repeat::merge(vocab, piece, self.limit, out) {
            self.merge_by_heap(vocab, piece, out);
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

    /// n log n: a heap of (rank, position) over a doubly linked list; an entry whose rank has changed is skipped.
    pub(crate) fn merge_by_heap(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        self.start(vocab, piece);
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
        let mut at = 0;
        while at < self.ids.len() {
            out.push(self.ids[at]);
            at = self.next[at] as usize;
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
