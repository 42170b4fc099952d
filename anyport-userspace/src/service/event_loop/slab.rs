//! Where a worker keeps its connections.

/// The place of a connection, and how many had it before: what is said of one that is gone reaches none that has its
/// place now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    place: u32,
    generation: u32,
}

/// Generations of a place, after which they repeat: they go into 31 bits.
const GENERATIONS: u32 = 1 << 31;

impl Key {
    /// With one bit more, as one number.
    pub(super) fn pack(self, bit: bool) -> u64 {
        u64::from(self.generation) << 33 | u64::from(self.place) << 1 | u64::from(bit)
    }

    /// The inverse of [`Self::pack`].
    pub(super) fn unpack(number: u64) -> (Self, bool) {
        let half = |number| u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default();
        (Self { place: half(number >> 1), generation: half(number >> 33) }, number & 1 != 0)
    }
}

/// Values in numbered places.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, value: T) -> Key {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, value: None });
            u32::try_from(self.slots.len() - 1).expect("a process has fewer descriptors")
        });
        let slot = &mut self.slots[place as usize];
        slot.value = Some(value);
        Key { place, generation: slot.generation }
    }

    /// The value, unless it is gone.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.place as usize)?;
        slot.value.as_mut().filter(|_| slot.generation == key.generation)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.place as usize)?;
        let value = slot.value.take_if(|_| slot.generation == key.generation)?;
        slot.generation = (slot.generation + 1) % GENERATIONS;
        self.free.push(key.place);
        Some(value)
    }

    /// Of all values.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        let key = |(place, slot): (usize, &Slot<T>)| {
            let place = u32::try_from(place).ok()?;
            slot.value.is_some().then_some(Key { place, generation: slot.generation })
        };
        self.slots.iter().enumerate().filter_map(key)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.slots.len() == self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::{GENERATIONS, Key, Slab};

    #[test]
    fn a_place_is_used_again_and_its_old_key_is_not() {
        let mut slab = Slab::default();
        let (one, two) = (slab.insert("one"), slab.insert("two"));
        assert_eq!(slab.remove(one), Some("one"));
        let three = slab.insert("three");
        assert_eq!((three.place, three.generation), (one.place, 1));
        assert!(slab.get_mut(one).is_none() && slab.remove(one).is_none());
        assert_eq!((slab.get_mut(two).copied(), slab.get_mut(three).copied()), (Some("two"), Some("three")));
        assert!(!slab.is_empty());
        assert_eq!((slab.remove(two), slab.remove(three)), (Some("two"), Some("three")));
        assert!(slab.is_empty());
    }

    #[test]
    fn keys_survive_the_kernel() {
        for key in [Key { place: 0, generation: 0 }, Key { place: u32::MAX, generation: GENERATIONS - 1 }] {
            for bit in [false, true] {
                assert_eq!(Key::unpack(key.pack(bit)), (key, bit));
            }
        }
    }
}
