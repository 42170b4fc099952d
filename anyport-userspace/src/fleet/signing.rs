//! Signatures of pointers, so that etcd and its writers need not be trusted.
//!
//! Ed25519 over ring, sequence and hash of the set. So neither a set nor an old pointer can be given to another ring, or
//! again later. Keys are PEM as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them.

use std::{fmt, io, str::FromStr};

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustix::rand::{GetRandomFlags, getrandom};
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject as _};

use super::layout::{Hash, Name, Pointer, from_hex, hex};
use crate::{as_text::as_text, rules::InvalidText, text::excerpt};

/// What is signed begins with this, so that no signature over anything else can be taken for one.
const DOMAIN: &[u8] = b"anyport fleet pointer 1\0";
/// The same of a node's report.
const REPORT_DOMAIN: &[u8] = b"anyport fleet report 1\0";
/// How a public key of Ed25519 begins in DER (RFC 8410): algorithm, and 32 bytes to come.
const ED25519_INFO: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// A signature, in hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 64]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

impl FromStr for Signature {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        from_hex(text)
            .map(Self)
            .ok_or_else(|| InvalidText(format!("signature {}: use 128 hexadecimal digits", excerpt(text))))
    }
}

as_text!(Signature);

/// Signs what an operator publishes.
#[derive(Debug)]
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a private key.
    ///
    /// # Errors
    /// It is not one of Ed25519.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidText> {
        let wrong = |why: &dyn fmt::Display| {
            InvalidText(format!(
                "no private key of Ed25519 in PEM: {why}; openssl genpkey -algorithm ed25519 makes one"
            ))
        };
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|error| wrong(&error))?;
        // openssl leaves the public key out, which would only repeat what the private key says.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der());
        pair.map(Self).map_err(|error| wrong(&error))
    }

    /// The keys by which others know what it has signed.
    pub fn public(&self) -> PublicKeys {
        let Self(pair) = self;
        let mut key = [0; 32];
        key.copy_from_slice(pair.public_key().as_ref());
        PublicKeys(vec![key])
    }

    /// Signs a pointer to this set.
    pub fn sign(&self, ring: &Name, sequence: u64, set: &Hash) -> Signature {
        let Self(pair) = self;
        let mut signature = [0; 64];
        signature.copy_from_slice(pair.sign(&message(ring, sequence, set)).as_ref());
        Signature(signature)
    }
}

/// Public keys, of which one has to have signed what a node follows. Two of them let keys be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKeys(Vec<[u8; 32]>);

impl PublicKeys {
    /// These and others.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self([self.0, others.0].concat())
    }

    /// Reads all public keys of a file.
    ///
    /// # Errors
    /// There is none, or one that is not of Ed25519.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidText> {
        let wrong = |why: &dyn fmt::Display| {
            InvalidText(format!(
                "no public key of Ed25519 in PEM: {why}; openssl pkey -pubout writes that of a private key"
            ))
        };
        let mut keys = Vec::new();
        for info in SubjectPublicKeyInfoDer::pem_slice_iter(pem) {
            let info = info.map_err(|error| wrong(&error))?;
            let key = info.strip_prefix(ED25519_INFO).and_then(|key| key.try_into().ok());
            keys.push(key.ok_or_else(|| wrong(&"it is of another algorithm"))?);
        }
        if keys.is_empty() {
            return Err(wrong(&"there is no public key"));
        }
        Ok(Self(keys))
    }

    /// Checks that one of the keys has signed a pointer.
    ///
    /// # Errors
    /// None of them has.
    pub fn verify(&self, pointer: &Pointer) -> Result<(), InvalidText> {
        let Pointer { ring, sequence, set, signature, .. } = pointer;
        let what = || format!("the pointer of the ring {ring} with the sequence {sequence}");
        let Some(Signature(signature)) = signature else {
            return Err(InvalidText(format!("{} has no signature, and a key is configured", what())));
        };
        let message = message(ring, *sequence, set);
        let Self(keys) = self;
        let signed = keys.iter().any(|key| UnparsedPublicKey::new(&ED25519, key).verify(&message, signature).is_ok());
        if signed {
            Ok(())
        } else {
            Err(InvalidText(format!("the signature of {} is not by a key that is configured", what())))
        }
    }
}

/// By which a node's reports are known: the node keeps a seed of it on its disk.
pub struct NodeKey {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl NodeKey {
    /// A new one.
    ///
    /// # Errors
    /// The kernel gives no randomness.
    pub fn random() -> io::Result<Self> {
        let mut seed = [0; 32];
        // So few bytes come whole.
        getrandom(&mut seed, GetRandomFlags::empty())?;
        Ok(Self::from_seed(seed))
    }

    /// The key of a seed.
    ///
    /// # Panics
    /// Never: every 32 bytes are a seed of Ed25519.
    #[expect(clippy::expect_used, reason = "the length is right by its type, which is all that is checked")]
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self { seed, pair: Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes") }
    }

    /// One that was kept by [`Self::seed`]; nothing if the text is none.
    pub fn kept(seed: &str) -> Option<Self> {
        from_hex(seed).map(Self::from_seed)
    }

    /// What has to be kept of it, and from others.
    pub fn seed(&self) -> String {
        hex(&self.seed)
    }

    /// What others know it by.
    pub fn public(&self) -> PublicKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(key)
    }

    /// Signs a report.
    pub fn sign(&self, report: &[u8]) -> Signature {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(&[REPORT_DOMAIN, report].concat()).as_ref());
        Signature(signature)
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.public())
    }
}

/// What a node's reports are checked by, in hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Whether its owner has signed a report.
    pub fn has_signed(&self, report: &[u8], Signature(signature): Signature) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(&[REPORT_DOMAIN, report].concat(), &signature).is_ok()
    }

    /// Enough of it for people to distinguish keys.
    pub fn short(&self) -> String {
        hex(&self.0[..6])
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        from_hex(text).map(Self).ok_or_else(|| InvalidText(format!("key {}: use 64 hexadecimal digits", excerpt(text))))
    }
}

as_text!(PublicKey);

/// What is signed. Every part has one length or says it, so that no two pointers make the same bytes.
fn message(ring: &Name, sequence: u64, set: &Hash) -> Vec<u8> {
    let ring = ring.as_str().as_bytes();
    let length = u64::try_from(ring.len()).unwrap_or(u64::MAX);
    [DOMAIN, &length.to_be_bytes(), ring, &sequence.to_be_bytes(), set.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::{PublicKeys, SigningKey};
    use crate::fleet::layout::{Hash, Pointer, Time};

    // Made by `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout`; of use for nothing but this.
    const PRIVATE: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIGXwCDFJ7GWDWegzPm3ZnVF7aWyREplJA5wiRASP673p\n-----END PRIVATE KEY-----\n";
    const PUBLIC: &[u8] = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAl92CCUZLyOPqSDCRrwl6OcRyfCPtW0s0Rfuaa3g6zGw=\n-----END PUBLIC KEY-----\n";
    const OTHER_PUBLIC: &[u8] = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAbUxuAKUSRizAmgFt/7H1A7ngbHD4xkfj5oU0rGPgbX4=\n-----END PUBLIC KEY-----\n";

    fn signed() -> Pointer {
        let key = SigningKey::from_pem(PRIVATE).unwrap();
        let (ring, set) = ("canary".parse().unwrap(), Hash::of("x"));
        let signature = Some(key.sign(&ring, 7, &set));
        Pointer { ring, sequence: 7, set, published: Time::now(), by: "a".into(), note: None, from: None, signature }
    }

    #[test]
    fn what_was_signed_is_followed_and_nothing_else() {
        let keys = PublicKeys::from_pem(PUBLIC).unwrap();
        let pointer = signed();
        keys.verify(&pointer).unwrap();
        let others = [
            Pointer { ring: "main".parse().unwrap(), ..pointer.clone() },
            Pointer { sequence: 8, ..pointer.clone() },
            Pointer { set: Hash::of("y"), ..pointer.clone() },
            Pointer { signature: None, ..pointer.clone() },
        ];
        for other in others {
            keys.verify(&other).unwrap_err();
        }
        // What people read of it is not signed.
        keys.verify(&Pointer { note: Some("n".into()), by: "b".into(), ..pointer.clone() }).unwrap();
        PublicKeys::from_pem(OTHER_PUBLIC).unwrap().verify(&pointer).unwrap_err();
        PublicKeys::from_pem(&[OTHER_PUBLIC, PUBLIC].concat()).unwrap().verify(&pointer).unwrap();
    }

    #[test]
    fn a_signature_is_written_and_read() {
        let pointer = signed();
        let text = serde_json::to_string(&pointer).unwrap();
        let again: Pointer = serde_json::from_str(&text).unwrap();
        assert_eq!(again.signature, pointer.signature);
        assert!(serde_json::from_str::<Pointer>(&text.replace("signature\":\"", "signature\":\"0")).is_err());
    }

    #[test]
    fn what_is_no_key_is_told() {
        for pem in [&b""[..], b"x", PUBLIC] {
            let error = SigningKey::from_pem(pem).unwrap_err().to_string();
            assert!(error.contains("openssl genpkey -algorithm ed25519"), "{error}");
        }
        for pem in [&b""[..], b"x", PRIVATE] {
            let error = PublicKeys::from_pem(pem).unwrap_err().to_string();
            assert!(error.contains("openssl pkey -pubout"), "{error}");
        }
    }
}
