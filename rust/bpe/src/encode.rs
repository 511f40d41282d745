//! From a piece to ids: merge the pair of lowest rank, leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::backtrack::Steps;
use crate::cache::{Cache, INLINE};
use crate::chunk::Chunk;
use crate::runs::prefetch;
use crate::unknown::{ToMerge, Unknown};
use crate::vocab::{NONE, Vocab};
use crate::{lanes, repeat, short};

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
    /// What `finish` writes on.
    holes: Vec<Hole>,
    unknown: Vec<Unknown>,
    aside: Vec<u32>,
}

/// A piece whose ids are to be put at `at`, among those of the others; they lie aside, from the one place to the other.
#[derive(Debug, Clone, Copy)]
struct Hole {
    piece: usize,
    at: usize,
    state: State,
    from: u32,
    to: u32,
}

/// Where the ids of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the neighbouring line of the cache, if anywhere.
    Beside,
    /// With the long pieces, if anywhere.
    Long,
    /// With the long pieces under this hash, if anywhere. Zero: nowhere.
    LongAt(u64),
    Aside,
    /// They are those of this one of the unknown pieces.
    Unknown(u32),
}

impl Hole {
    fn put_aside(&mut self, ids: &[u32], aside: &mut Vec<u32>) {
        self.from = aside.len() as u32;
        aside.extend_from_slice(ids);
        (self.to, self.state) = (aside.len() as u32, State::Aside);
    }
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
            holes: Vec::new(),
            unknown: Vec::new(),
            aside: Vec::new(),
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
        let first = out.len();
        out.resize(first + self.chunk.len() * INLINE, 0);
        let room = &mut out[first..];
        let mut end = 0;
        for i in 0..self.chunk.len() {
            let (key, hash) = self.chunk.key(i);
            let known = if key == 0 { None } else { self.cache.get(key, hash) };
            match known {
                Some(packed) if packed.len() > 0 => {
                    room[end..end + INLINE].copy_from_slice(&packed.ids());
                    end += packed.len();
                }
                _ => {
                    // An entry without ids says that the piece has many, which lie with those of long pieces.
                    let state = if key == 0 || known.is_some() { State::Long } else { State::Beside };
                    if state == State::Beside {
                        prefetch(self.cache.place(hash ^ 1));
                    }
                    self.holes.push(Hole { piece: i, at: end, state, from: 0, to: 0 });
                }
            }
        }
        out.truncate(first + end);
        if !self.holes.is_empty() {
            self.fill(first, vocab, text, out);
        }
        self.chunk.clear();
    }

    /// Puts the ids of the pieces that the first look did not find between those from `first` on.
    #[inline(never)]
    fn fill(&mut self, first: usize, vocab: &Vocab, text: &[u8], out: &mut Vec<u32>) {
        let mut holes = std::mem::take(&mut self.holes);
        let mut aside = std::mem::take(&mut self.aside);
        for hole in &mut holes {
            self.look_beside(hole, text, &mut aside);
        }
        for hole in &holes {
            if let State::LongAt(hash) = hole.state {
                self.cache.ask_for_long_ids(hash);
            }
        }
        self.unknown.clear();
        for hole in &mut holes {
            self.look_long(hole, text, &mut aside);
        }
        self.merge_unknown(vocab, text, &mut aside);
        let ids_of = |hole: &Hole| match hole.state {
            State::Unknown(i) => {
                let piece = &self.unknown[i as usize];
                &aside[piece.from as usize..piece.to as usize]
            }
            _ => &aside[hole.from as usize..hole.to as usize],
        };
        let mut known = out.len();
        let mut end = known + holes.iter().map(|hole| ids_of(hole).len()).sum::<usize>();
        out.resize(end, 0);
        for hole in holes.iter().rev() {
            let ids = ids_of(hole);
            let at = first + hole.at;
            end -= known - at;
            out.copy_within(at..known, end);
            known = at;
            end -= ids.len();
            out[end..end + ids.len()].copy_from_slice(ids);
        }
        holes.clear();
        aside.clear();
        (self.holes, self.aside) = (holes, aside);
    }

    /// Looks for a short piece beside its place, and asks for the place of a long one.
    fn look_beside(&mut self, hole: &mut Hole, text: &[u8], aside: &mut Vec<u32>) {
        let (key, hash) = self.chunk.key(hole.piece);
        if hole.state == State::Beside {
            match self.cache.get_beside(key, hash) {
                Some(packed) if packed.len() > 0 => {
                    hole.put_aside(&packed.ids()[..packed.len()], aside);
                }
                Some(_) => hole.state = State::Long,
                None => {}
            }
        }
        if hole.state == State::Long {
            let hash = Cache::long_hash(self.chunk.item(hole.piece).bytes(text)).unwrap_or(0);
            self.cache.ask_for_long(hash);
            hole.state = State::LongAt(hash);
        }
    }

    /// Looks for a long piece at its place, and notes what is nowhere.
    fn look_long(&mut self, hole: &mut Hole, text: &[u8], aside: &mut Vec<u32>) {
        let mut item = self.chunk.item(hole.piece);
        let bytes = item.bytes(text);
        match hole.state {
            State::LongAt(hash) => {
                if hash != 0
                    && let Some(ids) = self.cache.get_long(bytes, hash)
                {
                    return hole.put_aside(ids, aside);
                }
                (item.key, item.hash) = (0, hash);
            }
            State::Beside => {}
            _ => return,
        }
        let same = |other: &Unknown| {
            (other.item.hash, other.item.key) == (item.hash, item.key) && other.item.bytes(text) == bytes
        };
        let found = self.unknown.iter().position(same).unwrap_or_else(|| {
            self.unknown.push(Unknown::new(item));
            self.unknown.len() - 1
        });
        hole.state = State::Unknown(found as u32);
    }

    /// Puts the ids of the unknown pieces aside and into the cache.
    fn merge_unknown(&mut self, vocab: &Vocab, text: &[u8], aside: &mut Vec<u32>) {
        let mut unknown = std::mem::take(&mut self.unknown);
        for piece in &mut unknown {
            let bytes = piece.item.bytes(text);
            piece.from = aside.len() as u32;
            if let Some(id) = vocab.id(bytes) {
                aside.push(id);
            } else if bytes.len() > lanes::MOST {
                self.long_piece(vocab, bytes, aside);
            }
            piece.to = aside.len() as u32;
        }
        let (pieces, limit) = (unknown.as_mut_slice(), self.limit);
        lanes::merge::<16>(vocab, &mut ToMerge { text, pieces, lengths: 1..=16, limit, aside, next: 0 });
        let pieces = unknown.as_mut_slice();
        lanes::merge::<64>(vocab, &mut ToMerge { text, pieces, lengths: 17..=64, limit, aside, next: 0 });
        for Unknown { item, from, to } in &unknown {
            let ids = &aside[*from as usize..*to as usize];
            if item.key != 0 {
                // No ids: they are many, and kept with those of long pieces when the piece comes again.
                self.cache.put(item, if ids.len() <= INLINE { ids } else { &[] });
            } else if item.hash != 0 {
                self.cache.put_long(item.bytes(text), item.hash, ids);
            }
        }
        self.unknown = unknown;
    }

    /// Appends the ids of a piece that is no token and longer than `lanes::MOST`.
    fn long_piece(&mut self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
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
