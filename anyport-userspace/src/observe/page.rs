//! The page, out of its parts: one document, since nothing else may be loaded.

use std::fmt::Write as _;

use rustix::{
    io,
    rand::{GetRandomFlags, getrandom},
};

const PAGE: &str = concat!(
    include_str!("page/head.html"),
    "<style nonce=\"{nonce}\">\n",
    include_str!("page/page.css"),
    "</style>\n",
    include_str!("page/body.html"),
    "<script nonce=\"{nonce}\">\n\"use strict\";\n",
    include_str!("page/elements.js"),
    include_str!("page/charts.js"),
    include_str!("page/tables.js"),
    include_str!("page/views.js"),
    include_str!("page/main.js"),
    "</script>\n</html>\n",
);
/// What it has in place of a nonce.
const NONCE: &str = "{nonce}";

/// It with a nonce of its own, and the policy by which nothing but what it came with is run or shown.
pub(super) fn fresh() -> io::Result<(String, String)> {
    let mut bytes = [0_u8; 16];
    getrandom(bytes.as_mut_slice(), GetRandomFlags::empty())?;
    let nonce = bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        write!(text, "{byte:02x}").ok();
        text
    });
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    Ok((PAGE.replace(NONCE, &nonce), policy))
}
