//! The mark of packets, by which rules of policy routing and firewalls distinguish them (`SO_MARK`).

use std::{fmt, io, num::NonZeroU32, os::fd::AsFd, str::FromStr};

use socket2::SockRef;

use crate::{as_text::as_text, rules::InvalidText};

/// The mark of a service's answers: any but 0, which is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(NonZeroU32);

impl Mark {
    /// The number.
    pub fn number(self) -> u32 {
        self.0.get()
    }

    /// Gives a socket this mark, or none.
    ///
    /// # Errors
    /// It takes `CAP_NET_ADMIN`, or `CAP_NET_RAW` since Linux 5.17.
    pub(super) fn put_on(mark: Option<Self>, socket: &impl AsFd) -> io::Result<()> {
        let (socket, wanted) = (SockRef::from(socket), mark.map_or(0, Self::number));
        if mark.is_none() && socket.mark()? == wanted { Ok(()) } else { socket.set_mark(wanted) }
    }
}

impl FromStr for Mark {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let number = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        let mark = number.ok().and_then(NonZeroU32::new).map(Self);
        mark.ok_or_else(|| InvalidText(format!("{text:?}: not a mark; write a number of 32 bits, such as 0x10")))
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

as_text!(Mark, such as "0x10");

#[cfg(test)]
mod tests {
    use super::Mark;
    use crate::as_text::expect_same_json;

    #[test]
    fn marks_are_numbers_but_0() {
        expect_same_json::<Mark>(&["0x10", "0xffffffff"]);
        assert_eq!("16".parse::<Mark>().unwrap().to_string(), "0x10");
        for text in ["", "0", "0x0", "-1", "x", "0x100000000", "4294967296"] {
            assert!(text.parse::<Mark>().is_err(), "{text:?}");
        }
    }
}
