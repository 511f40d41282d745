//! The ids of pieces met before. Bounded: a piece may be forgotten at any time, which costs time and nothing else.
//!
//! Short pieces are their own keys, in pairs on one cache line; long ones are kept as bytes beside their ids.

use crate::chunk::{Item, Key};
use crate::count::hash_bytes;
use crate::memory::Zeros;
use crate::runs::prefetch;

/// 2^18 lines of 64 bytes: 16 MB, or half a million pieces. 20 MB of mixed text has 300,000.
const LINES: usize = 1 << 18;
/// Words of more than seven Cyrillic letters are long already.
const LONG_SLOTS: usize = 1 << 18;
/// Pieces longer than this are merged anew: they hardly ever come again.
const LONGEST: usize = 256;
const LONG_BYTES: usize = 4 << 20;
const LONG_IDS: usize = 1 << 20;

const ID_BITS: u32 = 24; // MAX_VOCAB_SIZE is 1 << 24
const ID_MASK: u32 = (1 << ID_BITS) - 1;
/// The most ids that fit beside a short key; 98 of 100 pieces have no more.
pub const INLINE: usize = 4;
/// In the second word of a value that was asked for again since it came.
const USED: u32 = 1 << ID_BITS;

/// A key, or a value: sixteen bytes as four words.
type Words = [u32; 4];

#[inline(always)]
fn words(key: Key) -> Words {
    // SAFETY: both are 16 bytes of plain numbers.
    unsafe { std::mem::transmute::<u128, Words>(key.to_le()) }
}

/// What a short piece becomes: four ids of 24 bits, and how many there are in the first word's last byte. None: they are
/// kept with those of long pieces.
#[derive(Debug, Clone, Copy)]
pub struct Packed(Words);

impl Packed {
    pub fn new(ids: &[u32]) -> Self {
        let mut words = [0; INLINE];
        words[..ids.len()].copy_from_slice(ids);
        words[0] |= (ids.len() as u32) << ID_BITS;
        Self(words)
    }

    #[inline(always)]
    pub fn len(self) -> usize {
        (self.0[0] >> ID_BITS) as usize
    }

    /// The ids, then anything.
    #[inline(always)]
    pub fn ids(self) -> [u32; INLINE] {
        self.0.map(|word| word & ID_MASK)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Long {
    hash: u64,
    bytes: u32,
    ids: u32,
    len: u16,
    count: u16,
}

#[derive(Debug, Default)]
pub struct Cache {
    /// Key, value, key, value on each line.
    lines: Zeros<Words>,
    long: Vec<Long>,
    long_bytes: Vec<u8>,
    long_ids: Vec<u32>,
}

impl Cache {
    /// Memory for the short pieces, once.
    pub fn prepare(&mut self) {
        if self.lines.is_empty() {
            self.lines = Zeros::new(LINES * 4);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    #[inline(always)]
    fn line(&self, hash: u64) -> usize {
        (hash as usize % LINES) * 4
    }

    #[inline(always)]
    pub fn place(&self, hash: u64) -> &Words {
        &self.lines[self.line(hash)]
    }

    #[inline(always)]
    fn line_at(&mut self, at: usize) -> &mut [Words; 4] {
        (&mut self.lines[at..at + 4]).try_into().expect("the range has 4 entries")
    }

    #[inline(always)]
    pub fn get(&mut self, key: Key, hash: u64) -> Option<Packed> {
        let at = self.line(hash);
        Self::get_in(self.line_at(at), &words(key))
    }

    /// `get` from the neighbouring line, where pieces go that find no place in their own.
    #[inline(always)]
    pub fn get_beside(&mut self, key: Key, hash: u64) -> Option<Packed> {
        let at = self.line(hash ^ 1);
        Self::get_in(self.line_at(at), &words(key))
    }

    #[inline(always)]
    fn get_in(line: &mut [Words; 4], key: &Words) -> Option<Packed> {
        // Which of the two it is cannot be predicted: an address in place of a branch.
        let way = 2 * usize::from(line[2] == *key);
        if line[way] != *key {
            return None;
        }
        let value = line[way + 1];
        if value[1] & USED == 0 {
            line[way + 1][1] |= USED;
        }
        Some(Packed(value))
    }

    /// Over an entry that was not asked for again, in the line of the piece or the neighbouring one. If all four were,
    /// those of its own line have to prove themselves anew.
    pub fn put(&mut self, item: &Item, ids: &[u32]) {
        debug_assert!(item.key != 0 as Key && ids.len() <= INLINE);
        let (own, beside) = (self.line(item.hash), self.line(item.hash ^ 1));
        let free = |line: &[Words; 4]| {
            let used = |way: usize| line[way + 1][1] & USED != 0;
            [0, 2].into_iter().find(|&way| line[way] == [0; 4]).or([2, 0].into_iter().find(|&way| !used(way)))
        };
        let (at, way) = match (free(self.line_at(own)), free(self.line_at(beside))) {
            (Some(way), _) => (own, way),
            (None, Some(way)) => (beside, way),
            (None, None) => {
                let line = self.line_at(own);
                line[1][1] &= !USED;
                line[3][1] &= !USED;
                (own, 0)
            }
        };
        let line = self.line_at(at);
        line[way] = words(item.key);
        line[way + 1] = Packed::new(ids).0;
    }

    /// Asks for the memory that `get_long` is going to read first.
    pub fn ask_for_long(&self, hash: u64) {
        if let Some(entry) = self.long.get(hash as usize % LONG_SLOTS) {
            prefetch(entry);
        }
    }

    /// Asks for what `get_long` is going to read next.
    pub fn ask_for_long_ids(&self, hash: u64) {
        if let Some(entry) = self.long.get(hash as usize % LONG_SLOTS)
            && entry.hash == hash
        {
            prefetch(&self.long_bytes[entry.bytes as usize]);
            prefetch(&self.long_ids[entry.ids as usize]);
        }
    }

    pub fn get_long(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let place = hash as usize % LONG_SLOTS;
        [place, place ^ 1].into_iter().find_map(|place| {
            let entry = self.long.get(place)?;
            let start = entry.bytes as usize;
            if entry.hash != hash || &self.long_bytes[start..start + entry.len as usize] != piece {
                return None;
            }
            Some(&self.long_ids[entry.ids as usize..][..entry.count as usize])
        })
    }

    pub fn put_long(&mut self, piece: &[u8], hash: u64, ids: &[u32]) {
        if piece.len() > LONGEST {
            return;
        }
        let full = self.long_bytes.len() + piece.len() > LONG_BYTES || self.long_ids.len() + ids.len() > LONG_IDS;
        if self.long.is_empty() || full {
            self.long.clear();
            self.long.resize(LONG_SLOTS, Long::default());
            self.long_bytes.clear();
            self.long_bytes.reserve_exact(LONG_BYTES);
            self.long_ids.clear();
            self.long_ids.reserve_exact(LONG_IDS);
        }
        let place = hash as usize % LONG_SLOTS;
        let place = if self.long[place].hash != 0 && self.long[place ^ 1].hash == 0 { place ^ 1 } else { place };
        self.long[place] = Long {
            hash,
            bytes: self.long_bytes.len() as u32,
            ids: self.long_ids.len() as u32,
            len: piece.len() as u16,
            count: ids.len() as u16,
        };
        self.long_bytes.extend_from_slice(piece);
        self.long_ids.extend_from_slice(ids);
    }

    /// The hash of a long piece, `None` for one that is not kept. Never zero, which marks an empty slot.
    #[inline]
    pub fn long_hash(piece: &[u8]) -> Option<u64> {
        if piece.len() <= LONGEST { Some(hash_bytes(piece) | 1 << 63) } else { None }
    }

    /// Bytes held; at most 17 MB for short pieces and 15 MB for long ones.
    pub fn bytes(&self) -> usize {
        self.lines.len() * 16
            + self.long.capacity() * size_of::<Long>()
            + self.long_bytes.capacity()
            + self.long_ids.capacity() * 4
    }
}
