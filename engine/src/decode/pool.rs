//! Which slots of a cache are whose: runs of slots for sequences, and prefixes that stay there for sequences to come,
//! until the room is needed. No device here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// A prefix whose keys and values lie in the cache.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    /// Where.
    pub slots: Range<usize>,
    /// What, as long as `slots`.
    pub tokens: Vec<u32>,
    /// Tokens in a block as attention knew it: another number gives other values.
    pub block: usize,
}

/// The slots of a cache.
pub(super) struct Pool {
    /// Free runs: start to length, never touching each other.
    free: BTreeMap<usize, usize>,
    /// The last used one is last.
    kept: Vec<Rc<Prefix>>,
}

impl Pool {
    pub fn new(slots: usize) -> Pool {
        Pool { free: BTreeMap::from([(0, slots)]), kept: Vec::new() }
    }

    /// A run of `n` free slots, the first that is long enough.
    pub fn take_free(&mut self, n: usize) -> Option<Range<usize>> {
        let (&start, &length) = self.free.iter().find(|(_, length)| **length >= n)?;
        self.free.remove(&start);
        if length > n {
            self.free.insert(start + n, length - n);
        }
        Some(start..start + n)
    }

    /// A run of `n` slots, the first that is long enough; prefixes that no one uses make room, those that were not
    /// used for longest first. `None` if there is no such run even so.
    pub fn take(&mut self, n: usize) -> Option<Range<usize>> {
        loop {
            if let Some(slots) = self.take_free(n) {
                return Some(slots);
            }
            let unused = self.kept.iter().position(|prefix| Rc::strong_count(prefix) == 1)?;
            let prefix = self.kept.remove(unused);
            self.give(prefix.slots.clone());
        }
    }

    /// Takes slots back.
    pub fn give(&mut self, mut slots: Range<usize>) {
        if slots.is_empty() {
            return;
        }
        if let Some((&start, &length)) = self.free.range(..slots.start).next_back()
            && start + length == slots.start
        {
            self.free.remove(&start);
            slots.start = start;
        }
        if let Some(length) = self.free.remove(&slots.end) {
            slots.end += length;
        }
        self.free.insert(slots.start, slots.len());
    }

    /// Keeps a prefix; its slots are the pool's from now on.
    pub fn keep(&mut self, prefix: Prefix) -> Rc<Prefix> {
        let prefix = Rc::new(prefix);
        self.kept.push(prefix.clone());
        prefix
    }

    /// Forgets the prefix that begins at this slot if no one uses it; its slots are the caller's then.
    pub fn forget(&mut self, slot: usize) -> bool {
        let unused = |p: &Rc<Prefix>| p.slots.start == slot && Rc::strong_count(p) == 1;
        let at = self.kept.iter().position(unused);
        at.map(|at| self.kept.remove(at)).is_some()
    }

    /// The prefix that has the most in common with `tokens`, and how many tokens that is: whole blocks of
    /// `granularity`. It is the last used one from now on.
    pub fn find(
        &mut self,
        tokens: &[u32],
        block: usize,
        granularity: usize,
    ) -> Option<(Rc<Prefix>, usize)> {
        let common = |prefix: &Prefix| {
            let same = prefix.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            if prefix.block == block { same / granularity * granularity } else { 0 }
        };
        let lengths = self.kept.iter().map(|prefix| common(prefix)).enumerate();
        let (at, n) = lengths.max_by_key(|&(_, n)| n).filter(|&(_, n)| n > 0)?;
        let prefix = self.kept.remove(at);
        self.kept.push(prefix.clone());
        Some((prefix, n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(slots: Range<usize>, tokens: &[u32]) -> Prefix {
        Prefix { slots, tokens: tokens.to_vec(), block: 4 }
    }

    #[test]
    fn runs_are_cut_and_joined() {
        let mut pool = Pool::new(10);
        let runs = [4, 3, 3].map(|n| pool.take(n).expect("there is room"));
        assert_eq!(runs, [0..4, 4..7, 7..10]);
        assert_eq!(pool.take(1), None);
        pool.give(0..4);
        pool.give(7..10);
        assert_eq!(pool.take(5), None, "the free slots are not side by side");
        pool.give(4..7);
        assert_eq!(pool.take(10), Some(0..10));
        pool.give(2..3);
        pool.give(3..3);
        assert_eq!((pool.take(1), pool.take(1)), (Some(2..3), None));
    }

    #[test]
    fn the_longest_common_beginning_is_found_in_whole_blocks() {
        let mut pool = Pool::new(100);
        let slots = pool.take(12).expect("room");
        pool.keep(prefix(slots, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]));
        let slots = pool.take(4).expect("room");
        pool.keep(prefix(slots, &[1, 2, 3, 9]));
        let (found, n) = pool.find(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 0], 4, 4).expect("one fits");
        assert_eq!((found.slots.clone(), n), (0..12, 8));
        assert!(pool.find(&[1, 2, 3, 4], 8, 4).is_none(), "blocks of another length");
        assert!(pool.find(&[1, 2, 3], 4, 4).is_none());
    }

    #[test]
    fn unused_prefixes_make_room_the_oldest_first() {
        let mut pool = Pool::new(8);
        for token in [1, 2] {
            let slots = pool.take(4).expect("room");
            pool.keep(prefix(slots, &[token; 4]));
        }
        let used = pool.find(&[1; 4], 4, 4).expect("kept").0;
        assert_eq!(pool.take(4), Some(4..8), "the other one was older");
        assert_eq!(pool.take(4), None, "this one is in use");
        drop(used);
        assert_eq!(pool.take(4), Some(0..4));
    }
}
