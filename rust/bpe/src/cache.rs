//! The ids of pieces met before. Bounded: a piece may be forgotten at any time, which costs time and nothing else.
//!
//! Short pieces are their own keys, in pairs on one cache line; long ones are kept as bytes beside their ids.

use crate::chunk::{Item, Key};
use crate::count::hash_bytes;

/// 2^18 lines of 64 bytes: 16 MB, or half a million pieces. 20 MB of mixed text has 300,000.
const LINES: usize = 1 << 18;
/// Words of more than seven Cyrillic letters are long already.
const LONG_SLOTS: usize = 1 << 18;
/// Pieces longer than this are merged anew: they hardly ever come again.
const LONGEST: usize = 256;
const LONG_BYTES: usize = 4 << 20;
const LONG_IDS: usize = 1 << 20;

const ID_BITS: u32 = 24; // MAX_VOCAB_SIZE is 1 << 24
const ID_MASK: u128 = (1 << ID_BITS) - 1;
/// The most ids that fit beside a short key.
pub const INLINE: usize = 5;

/// What a short piece becomes: five ids of 24 bits, and how many there are in the last byte. None: they are kept with
/// those of long pieces.
#[derive(Debug, Clone, Copy)]
pub struct Packed(u128);

impl Packed {
    pub fn new(ids: &[u32]) -> Self {
        let packed = ids.iter().rev().fold(0u128, |packed, &id| packed << ID_BITS | u128::from(id));
        Self(packed | (ids.len() as u128) << 120)
    }

    #[inline(always)]
    pub fn len(self) -> usize {
        (self.0 >> 120) as usize
    }

    /// The ids, then anything.
    #[inline(always)]
    pub fn ids(self) -> [u32; INLINE] {
        std::array::from_fn(|i| ((self.0 >> (ID_BITS as usize * i)) & ID_MASK) as u32)
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
    /// Key, value, key, value on each line. Zeroed memory that is not touched costs nothing.
    lines: Vec<u128>,
    /// Entries before the first whole cache line.
    skip: usize,
    long: Vec<Long>,
    long_bytes: Vec<u8>,
    long_ids: Vec<u32>,
}

impl Cache {
    /// Memory for the short pieces, once.
    pub fn prepare(&mut self) {
        if self.lines.is_empty() {
            self.lines = vec![0; LINES * 4 + 3];
            ask_for_huge_pages(&self.lines);
            self.skip = (self.lines.as_ptr() as usize).wrapping_neg() % 64 / 16;
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    #[inline(always)]
    fn line(&self, hash: u64) -> usize {
        self.skip + (hash as usize % LINES) * 4
    }

    #[inline(always)]
    pub fn place(&self, hash: u64) -> &u128 {
        &self.lines[self.line(hash)]
    }

    #[inline(always)]
    pub fn get(&self, item: &Item) -> Option<Packed> {
        let at = self.line(item.hash);
        let line: &[u128; 4] = self.lines[at..at + 4].try_into().expect("the range has 4 entries");
        if line[0] == item.key {
            Some(Packed(line[1]))
        } else if line[2] == item.key {
            Some(Packed(line[3]))
        } else {
            None
        }
    }

    /// The newest of a line comes first, and the second is forgotten.
    pub fn put(&mut self, item: &Item, ids: &[u32]) {
        debug_assert!(item.key != 0 as Key && ids.len() <= INLINE);
        let at = self.line(item.hash);
        self.lines.copy_within(at..at + 2, at + 2);
        self.lines[at] = item.key;
        self.lines[at + 1] = Packed::new(ids).0;
    }

    pub fn get_long(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let entry = self.long.get(hash as usize % LONG_SLOTS)?;
        let start = entry.bytes as usize;
        if entry.hash != hash || &self.long_bytes[start..start + entry.len as usize] != piece {
            return None;
        }
        Some(&self.long_ids[entry.ids as usize..][..entry.count as usize])
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
        self.long[hash as usize % LONG_SLOTS] = Long {
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
        self.lines.capacity() * 16
            + self.long.capacity() * size_of::<Long>()
            + self.long_bytes.capacity()
            + self.long_ids.capacity() * 4
    }
}

/// A random look into 16 MB misses the table of small pages nearly every time.
fn ask_for_huge_pages(memory: &[u128]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (memory.as_ptr() as usize).next_multiple_of(PAGE);
        let end = memory.as_ptr_range().end as usize / PAGE * PAGE;
        // SAFETY: the whole pages of a live allocation; the advice changes no content, and a refusal changes nothing.
        unsafe { libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}
