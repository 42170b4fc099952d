//! One order for the forward declarations in a `.BTF` section.
//!
//! LLVM emits them last and in the order of addresses in its memory, which differs from machine to machine
//! (`BTFDebug::FixupDerivedTypes` is a map by pointer). Everything else comes in the order of the program.
//! Format: <https://docs.kernel.org/bpf/btf.html>.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Name, info, size or type.
const TYPE_LEN: usize = 12;

/// A forward declaration as it stands in the section.
struct Forward {
    id: u32,
    at: usize,
    info: u32,
    name_offset: u32,
    name: Vec<u8>,
}

/// Sorts the forward declarations by name, and their names in the string table with them.
pub(crate) fn sort_forward_declarations(btf: &mut [u8]) -> Result<()> {
    let header_len = word(btf, 4)? as usize;
    let types_start = header_len + word(btf, 8)? as usize;
    let types_end = types_start + word(btf, 12)? as usize;
    let strings_start = header_len + word(btf, 16)? as usize;
    let strings_end = strings_start + word(btf, 20)? as usize;
    ensure!(strings_end <= btf.len(), "BTF ends before its string table does");

    let mut types = Vec::new();
    let mut at = types_start;
    while at < types_end {
        types.push(at);
        at += TYPE_LEN + trailer_len(word(btf, at + 4)?)?;
    }
    let strings = &btf[strings_start..strings_end];
    let mut forward = Vec::new();
    for (&at, id) in types.iter().zip(1..) {
        let info = word(btf, at + 4)?;
        if kind(info) == FWD {
            let name_offset = word(btf, at)?;
            let name = strings.get(name_offset as usize..).context("a name beyond the strings")?;
            let name = name.split_inclusive(|&byte| byte == 0).next().unwrap_or_default().to_vec();
            forward.push(Forward { id, at, info, name_offset, name });
        }
    }

    let new_offsets = sort_last_names(&mut btf[strings_start..strings_end], &forward)?;
    let mut sorted: Vec<&Forward> = forward.iter().collect();
    sorted.sort_by_key(|forward| (&forward.name, forward.info));
    let mut new_ids = BTreeMap::new();
    for (place, moved) in forward.iter().zip(sorted) {
        let name_offset = new_offsets.get(&moved.name_offset).unwrap_or(&moved.name_offset);
        set_word(btf, place.at, *name_offset);
        set_word(btf, place.at + 4, moved.info);
        new_ids.insert(moved.id, place.id);
    }
    for at in types {
        for reference in references(at, word(btf, at + 4)?) {
            if let Some(new) = new_ids.get(&word(btf, reference)?) {
                set_word(btf, reference, *new);
            }
        }
    }
    Ok(())
}

/// Sorts the strings that were added for the forward declarations: those at the end of the table. Names that
/// something else has too stand further up and stay. Returns the new offset for each old one.
fn sort_last_names(strings: &mut [u8], forward: &[Forward]) -> Result<BTreeMap<u32, u32>> {
    let by_offset: BTreeMap<u32, &[u8]> = forward.iter().map(|forward| (forward.name_offset, &*forward.name)).collect();
    let mut start = strings.len();
    let mut last = Vec::new();
    for (offset, name) in by_offset.into_iter().rev() {
        if offset as usize + name.len() != start {
            break;
        }
        start = offset as usize;
        last.push((name, offset));
    }
    ensure!(forward.is_empty() || !last.is_empty(), "the names of the forward declarations are not the last strings");
    last.sort_unstable();
    let mut new_offsets = BTreeMap::new();
    for (name, old) in last {
        new_offsets.insert(old, u32::try_from(start)?);
        strings[start..start + name.len()].copy_from_slice(name);
        start += name.len();
    }
    Ok(new_offsets)
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

fn members(info: u32) -> usize {
    (info & 0xffff) as usize
}

/// How many bytes follow the three words that every type begins with.
fn trailer_len(info: u32) -> Result<usize> {
    Ok(match kind(info) {
        INT | VAR | DECL_TAG => 4,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | ENUM64 => 12 * members(info),
        ENUM | FUNC_PROTO => 8 * members(info),
        PTR | FWD | TYPEDEF..=FUNC | FLOAT | TYPE_TAG => 0,
        unknown => anyhow::bail!("BTF kind {unknown} is not known"),
    })
}

/// Where the type at `at` has the ids of others.
fn references(at: usize, info: u32) -> Vec<usize> {
    let trailer = at + TYPE_LEN;
    match kind(info) {
        PTR | TYPEDEF..=FUNC | VAR | DECL_TAG | TYPE_TAG => vec![at + 8],
        ARRAY => vec![trailer, trailer + 4],
        STRUCT | UNION => (0..members(info)).map(|member| trailer + 12 * member + 4).collect(),
        DATASEC => (0..members(info)).map(|member| trailer + 12 * member).collect(),
        FUNC_PROTO => {
            let parameters = (0..members(info)).map(|member| trailer + 8 * member + 4);
            std::iter::once(at + 8).chain(parameters).collect()
        }
        _ => Vec::new(),
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    Ok(u32::from_le_bytes(*word.with_context(|| format!("BTF ends before byte {at}"))?))
}

fn set_word(bytes: &mut [u8], at: usize, word: u32) {
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::{FWD, PTR, TYPE_LEN, sort_forward_declarations};

    /// Pointers to `names[0]`, `names[1]`, …, then their forward declarations in the order of `emitted`.
    fn section(names: [&str; 3], emitted: [usize; 3]) -> Vec<u8> {
        let mut types = Vec::new();
        let mut strings = b"\0earlier\0".to_vec();
        for pointer in 0..3 {
            let position = emitted.iter().position(|&index| index == pointer).expect("emitted");
            types.extend([0, PTR << 24, u32::try_from(4 + position).expect("small")]);
        }
        for index in emitted {
            types.extend([u32::try_from(strings.len()).expect("small"), FWD << 24, 0]);
            strings.extend(names[index].as_bytes());
            strings.push(0);
        }
        let types_len = u32::try_from(6 * TYPE_LEN).expect("small");
        let strings_len = u32::try_from(strings.len()).expect("small");
        let header = [0x0001_eb9f, 24, 0, types_len, types_len, strings_len];
        let words = header.into_iter().chain(types).flat_map(u32::to_le_bytes);
        words.chain(strings).collect()
    }

    #[test]
    fn every_order_becomes_the_same() {
        let names = ["sock", "flow_keys", "argument"];
        let sorted = section(names, [2, 1, 0]);
        for emitted in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut btf = section(names, emitted);
            sort_forward_declarations(&mut btf).expect("BTF");
            assert_eq!(btf, sorted, "from {emitted:?}");
        }
    }

    #[test]
    fn a_truncated_section_is_an_error() {
        let whole = section(["a", "b", "c"], [0, 1, 2]);
        for length in 0..whole.len() {
            assert!(sort_forward_declarations(&mut whole[..length].to_vec()).is_err(), "{length} bytes");
        }
    }
}
