//! A set's text, as it is stored and back.
//!
//! Lists of rules are repetitive: gzip makes a tenth of 200,000 rules in order, and a quarter of as many at random, so that
//! most sets are one chunk.

use std::io::{self, Read as _, Write as _};

use flate2::{read::GzDecoder, write::GzEncoder};

use super::layout::{Compression, Hash, Manifest};
use crate::rules::InvalidText;

/// Bytes of a chunk: below the 1.5 MiB that etcd takes in a request, which leaves space for what is around it.
pub const CHUNK: usize = 1 << 20;
/// Bytes of the largest text: what `apply` takes, too.
pub const LARGEST: usize = 256 << 20;
/// Chunks of the largest set. One transaction names them all, and etcd takes 128 operations in one.
pub const MOST_CHUNKS: usize = 100;

/// A set, ready to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// By what it is found.
    pub hash: Hash,
    /// How it is stored.
    pub manifest: Manifest,
    text: String,
    compressed: Vec<u8>,
}

impl Packed {
    /// Compresses a text.
    ///
    /// # Errors
    /// It is too large.
    pub fn new(text: &str) -> Result<Self, InvalidText> {
        if text.len() > LARGEST {
            return Err(InvalidText(format!("the set has {} bytes, and {LARGEST} are the limit", text.len())));
        }
        let compressed = deflate(text)?;
        let chunks = compressed.len().div_ceil(CHUNK);
        if chunks > MOST_CHUNKS {
            return Err(InvalidText(format!(
                "the set has {} bytes when compressed, and {} are the limit",
                compressed.len(),
                MOST_CHUNKS * CHUNK
            )));
        }
        let manifest = Manifest { bytes: text.len(), chunks, compression: Compression::Gzip };
        Ok(Self { hash: Hash::of(text), manifest, text: text.to_owned(), compressed })
    }

    /// What it is.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Bytes that are stored.
    pub fn stored(&self) -> usize {
        self.compressed.len()
    }

    /// What is stored, in order.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.compressed.chunks(CHUNK)
    }
}

impl Manifest {
    /// Checks that a set can be as this says, before it is fetched.
    ///
    /// # Errors
    /// It is larger than sets are.
    pub fn validate(&self) -> Result<(), InvalidText> {
        let Self { bytes, chunks, .. } = self;
        if *bytes > LARGEST || *chunks > MOST_CHUNKS {
            return Err(InvalidText(format!(
                "the set would have {bytes} bytes in {chunks} chunks, and {LARGEST} in {MOST_CHUNKS} are the limit"
            )));
        }
        Ok(())
    }

    /// The text that chunks, in order, stand for.
    ///
    /// # Errors
    /// It is not the text of that hash.
    pub fn unpack(&self, hash: &Hash, chunks: &[impl AsRef<[u8]>]) -> Result<String, InvalidText> {
        let wrong = |why: String| InvalidText(format!("the set {hash} is spoilt: {why}"));
        self.validate().map_err(|InvalidText(why)| wrong(why))?;
        if chunks.len() != self.chunks {
            return Err(wrong(format!("there are {} chunks of {}", chunks.len(), self.chunks)));
        }
        let stored: Vec<u8> = chunks.iter().flat_map(AsRef::as_ref).copied().collect();
        let text = match self.compression {
            Compression::None => stored,
            Compression::Gzip => {
                inflate(&stored, self.bytes).map_err(|error| wrong(format!("decompress it: {error}")))?
            }
        };
        if text.len() != self.bytes {
            return Err(wrong(format!("it should have {} bytes", self.bytes)));
        }
        let text = String::from_utf8(text).map_err(|error| wrong(error.to_string()))?;
        hash.expect(&text).map_err(|found| wrong(format!("its text has the hash {found}")))?;
        Ok(text)
    }
}

/// By gzip.
pub(super) fn deflate(text: &str) -> Result<Vec<u8>, InvalidText> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    let compressed = encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish());
    compressed.map_err(|error| InvalidText(format!("compress the set: {error}")))
}

/// Makes so many bytes at most and one that shows that there are more, whatever it is given.
pub(super) fn inflate(stored: &[u8], most: usize) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    GzDecoder::new(stored).take(limit).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::{CHUNK, LARGEST, MOST_CHUNKS, Packed};
    use crate::fleet::layout::{Compression, Hash, Manifest};

    /// Text that gzip can't make much smaller.
    fn noise(bytes: usize) -> String {
        let mut state = 1_u64;
        let mut text = String::with_capacity(bytes + 16);
        while text.len() < bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write!(text, "{:08x}", state >> 32).unwrap();
        }
        text
    }

    fn unpack(packed: &Packed) -> String {
        packed.manifest.unpack(&packed.hash, &packed.chunks().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn large_sets_come_in_chunks() {
        let text = noise(5 << 20);
        let packed = Packed::new(&text).unwrap();
        assert!(packed.manifest.chunks > 1 && packed.chunks().all(|chunk| chunk.len() <= CHUNK), "{packed:?}");
        assert_eq!(unpack(&packed), text);
    }

    #[test]
    fn what_is_spoilt_is_told() {
        let text = noise(3 << 20);
        let packed = Packed::new(&text).unwrap();
        let chunks: Vec<_> = packed.chunks().map(<[u8]>::to_vec).collect();
        let Packed { hash, manifest, .. } = packed;
        let refused = |manifest: Manifest, hash: &Hash, chunks: &[Vec<u8>]| {
            let Err(error) = manifest.unpack(hash, chunks) else { panic!("not refused: {manifest:?}") };
            error.to_string()
        };
        let mut swapped = chunks.clone();
        swapped.swap(0, 1);
        let mut flipped = chunks.clone();
        flipped[1][77] ^= 1;
        for chunks in [&[], &chunks[..1], &swapped, &flipped] {
            refused(manifest, &hash, chunks);
        }
        refused(manifest, &Hash::of("other"), &chunks);
        refused(Manifest { compression: Compression::None, ..manifest }, &hash, &chunks);
        refused(Manifest { bytes: manifest.bytes - 1, ..manifest }, &hash, &chunks);
        for manifest in [Manifest { bytes: LARGEST + 1, ..manifest }, Manifest { chunks: MOST_CHUNKS + 1, ..manifest }]
        {
            assert!(refused(manifest, &hash, &chunks).contains("limit"));
        }
    }

    #[test]
    fn a_set_may_be_stored_as_it_is() {
        let manifest = Manifest { bytes: 2, chunks: 2, compression: Compression::None };
        assert_eq!(manifest.unpack(&Hash::of("ab"), &["a", "b"]).unwrap(), "ab");
        assert_eq!(unpack(&Packed::new("").unwrap()), "");
    }

    proptest! {
        #[test]
        fn there_and_back(text in ".*") {
            prop_assert_eq!(unpack(&Packed::new(&text).unwrap()), text);
        }

        #[test]
        fn nonsense_is_refused(bytes in 0..1000_usize, chunks: Vec<Vec<u8>>) {
            let manifest = Manifest { bytes, chunks: chunks.len(), compression: Compression::Gzip };
            prop_assert!(manifest.unpack(&Hash::of("x"), &chunks).is_err());
        }
    }
}
