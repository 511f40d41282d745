//! The id of two tokens together, in one cache line: a word of 8 bytes per pair in a table with room to spare.

use crate::memory::Zeros;
use crate::runs::prefetch;

/// Ids are below `MAX_VOCAB_SIZE`, 1 << 24, so that a pair has 48 bits.
const ID_BITS: u32 = 24;
const PAIR_BITS: u32 = 2 * ID_BITS;
const FEWEST_BITS: u32 = 16;
/// As new memory is.
const EMPTY: u64 = 0;
/// The farthest that a pair may lie from its place: 255 would allow a slot that looks empty.
const FARTHEST: u64 = 254;

/// A pair is multiplied by an odd number modulo 2^48, which loses nothing: the first bits of the product are its place,
/// and the slot holds how far away it lies (8 bits), the other bits of the product (at most 32), and the id (24), all bits turned.
#[derive(Debug)]
pub struct Pairs {
    slots: Zeros<u64>,
    bits: u32,
}

impl Pairs {
    /// `pairs`: left, right and joined id; a pair occurs once.
    pub fn new(pairs: &[(u32, u32, u32)]) -> Self {
        let bits = (pairs.len() * 2).max(1).next_power_of_two().ilog2().max(FEWEST_BITS);
        (bits..=PAIR_BITS).find_map(|bits| Self::with_bits(pairs, bits)).expect("no two pairs share a product")
    }

    fn with_bits(pairs: &[(u32, u32, u32)], bits: u32) -> Option<Self> {
        let mut table = Self { slots: Zeros::new(1 << bits), bits };
        for &(left, right, id) in pairs {
            let (mut at, tag) = table.place(left, right);
            let mut distance = 0;
            while table.slots[at] != EMPTY {
                at = (at + 1) & (table.slots.len() - 1);
                distance += 1;
            }
            if distance > FARTHEST {
                return None;
            }
            table.slots[at] = !((distance << 32 | tag) << ID_BITS | u64::from(id));
        }
        Some(table)
    }

    /// Where a pair belongs, and what is left of its product.
    #[inline(always)]
    fn place(&self, left: u32, right: u32) -> (usize, u64) {
        let pair = u64::from(left) << ID_BITS | u64::from(right);
        // Shifted to the top of the word, where the product is cut by itself.
        let product = pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) << (64 - PAIR_BITS);
        ((product >> (64 - self.bits)) as usize, product << self.bits >> (64 - PAIR_BITS + self.bits))
    }

    /// Asks for the memory that `get` is going to read.
    #[inline(always)]
    pub fn ask(&self, left: u32, right: u32) {
        prefetch(&self.slots[self.place(left, right).0]);
    }

    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> Option<u32> {
        let (mut at, tag) = self.place(left, right);
        let mut wanted = tag;
        loop {
            let slot = self.slots[at & (self.slots.len() - 1)];
            if !slot >> ID_BITS == wanted {
                return Some(!slot as u32 & ((1 << ID_BITS) - 1));
            }
            if slot == EMPTY {
                return None;
            }
            at += 1;
            wanted += 1 << 32;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const LARGEST: u32 = (1 << ID_BITS) - 1;

    proptest! {
        #[test]
        fn every_pair_is_found_and_no_other(
            pairs in prop::collection::hash_map((0..=LARGEST, prop_oneof![0..9u32, 0..=LARGEST]), 0..=LARGEST, 0..300),
            others in prop::collection::vec((0..=LARGEST, 0..=LARGEST), 0..100),
        ) {
            let list: Vec<_> = pairs.iter().map(|(&(left, right), &id)| (left, right, id)).collect();
            let table = Pairs::new(&list);
            for pair in pairs.keys().chain(&others) {
                prop_assert_eq!(table.get(pair.0, pair.1), pairs.get(pair).copied());
            }
        }
    }

    #[test]
    fn a_full_table_of_neighbouring_ids_keeps_every_pair() {
        let list: Vec<_> = (0..300).flat_map(|l| (0..300).map(move |r| (l, r, LARGEST - l - r))).collect();
        let table = Pairs::new(&list);
        let known: HashMap<_, _> = list.iter().map(|&(l, r, id)| ((l, r), id)).collect();
        for l in 0..310 {
            (0..310).for_each(|r| assert_eq!(table.get(l, r), known.get(&(l, r)).copied()));
        }
    }
}
