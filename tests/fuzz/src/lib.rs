//! What the fuzz targets do with an input. The inputs in `corpus/` are replayed as ordinary tests; `cargo xtask fuzz`
//! looks for new ones.

use std::sync::Arc;

use anyport::{
    api::{AddPrefixes, Apply, Explain, ListPrefixes, Listen, Problem, Reload, RemovePrefixes, TakeOver, parse},
    fleet::{LineEdits, delta::Delta},
    register,
    rule_file::RuleFile,
    rules::lines,
    service::{
        ServiceConfig,
        forward::{
            config::ProxyVersion,
            header::{self, Parsed},
        },
    },
};
use anyport_common::{
    flow::{Address, Transport, Version},
    packet::{self, Packet},
};
use serde::{Serialize, de::DeserializeOwned};

/// Reads the input as a frame and as an IP packet. Beyond not panicking, what was read must be in the input: both
/// addresses, and the ports, if they were read, one after the other.
pub fn packet(input: &[u8]) {
    for packet in [packet::from_ethernet(input), packet::from_ip(input)].into_iter().flatten() {
        let Packet { flow, source_port, is_unreadable, .. } = packet;
        let ports = [source_port.to_be_bytes(), flow.port.to_be_bytes()].concat();
        assert!(is_unreadable || contains(input, &ports), "ports of {packet:?}");
        for address in [flow.source, flow.address] {
            assert!(contains(input, &bytes(address)), "{address:?} of {packet:?}");
        }
    }
}

/// Reads the input as the body of each request, as the query of each, and as a request at the socket for registering. A refused
/// one is refused with a message; an accepted one is the same after it has been written and read again, so that the client
/// and the daemon mean the same by it.
pub fn api(input: &[u8]) {
    body::<AddPrefixes>(input);
    body::<RemovePrefixes>(input);
    body::<ServiceConfig>(input);
    body::<TakeOver>(input);
    body::<register::Request>(input);
    let Ok(text) = str::from_utf8(input) else { return };
    query::<Apply>(text);
    query::<Explain>(text);
    query::<ListPrefixes>(text);
    query::<Listen>(text);
    query::<Reload>(text);
}

/// Reads the input as a file of services and rules, in either form. A refused one is refused with a message; the rules of
/// an accepted one are the same after they have been written as lines and read again, and so are its services as bodies.
pub fn file(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let file = match RuleFile::parse(text, Arc::new) {
        Ok(file) => file,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let written = |(prefix, terms): &lines::LineRule| lines::RuleLine(prefix, terms).to_string();
    let mut rules: Vec<_> = file.rules.iter().map(|(rule, _)| written(rule)).collect();
    let again = lines::parse(&rules.join("\n"), Arc::new).expect("written rules can be read");
    let mut again: Vec<_> = again.iter().map(|(rule, _)| written(rule)).collect();
    // They come in order of precedence.
    rules.sort();
    again.sort();
    assert_eq!(again, rules);
    for service in file.services.into_iter().flatten() {
        body::<ServiceConfig>(&serde_json::to_vec(&service).expect("a service can be written"));
    }
}

/// Takes the input for a text, and behind the first zero byte for what makes another text out of it. Whatever that is: the lines that go
/// and come are those by which the two texts differ, so that what a node makes active by them is what the text says that has the
/// signed hash.
pub fn delta(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let Some((before, steps)) = text.split_once('\0') else { return };
    let Ok((after, LineEdits { removed, added })) = Delta::of_steps(steps.to_owned()).apply(before) else { return };
    let sorted = |texts: [&str; 2]| {
        let mut lines: Vec<String> = texts.iter().flat_map(|text| text.lines().map(str::to_owned)).collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(sorted([before, &added]), sorted([&after, &removed]), "{steps:?}");
}

/// Reads the input as the beginning of a connection. A header is none before its last byte has come, is no other one with
/// what follows, and tells the same after it has been written, in either version, and read again.
pub fn header(input: &[u8]) {
    let Ok(Parsed::Header { ends, length }) = header::parse(input) else { return };
    let whole = Ok(Parsed::Header { ends, length });
    assert_eq!(header::parse(&input[..length]), whole);
    for end in 0..length {
        assert_eq!(header::parse(&input[..end]), Ok(Parsed::Incomplete), "{end} of {length} bytes");
    }
    let Some(ends) = ends else { return };
    for version in [ProxyVersion::V1, ProxyVersion::V2] {
        let mut written = Vec::new();
        header::write(version, Transport::Tcp, ends, &mut written);
        assert_eq!(header::parse(&written), Ok(Parsed::Header { ends: Some(ends), length: written.len() }));
    }
}

fn body<T: Serialize + DeserializeOwned>(input: &[u8]) {
    let write = |body: &T| serde_json::to_string(body).expect("a body can be written");
    match parse::<T>(input) {
        Ok(body) => {
            let written = write(&body);
            let again = parse(written.as_bytes());
            assert_eq!(again.map(|body| write(&body)), Ok(written));
        }
        Err(Problem { error, .. }) => assert!(!error.is_empty()),
    }
}

fn query<T: Serialize + DeserializeOwned>(text: &str) {
    let write = |query: &T| serde_urlencoded::to_string(query).expect("a query can be written");
    match serde_urlencoded::from_str::<T>(text) {
        Ok(query) => {
            let written = write(&query);
            let again = serde_urlencoded::from_str(&written);
            assert_eq!(again.map(|query| write(&query)).map_err(|error| error.to_string()), Ok(written));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn bytes(address: Address) -> Vec<u8> {
    let Address { version, high, low } = address;
    let all = [high.to_be_bytes(), low.to_be_bytes()].concat();
    match version {
        Version::V4 => all[..4].to_vec(),
        Version::V6 => all,
    }
}

fn contains(input: &[u8], part: &[u8]) -> bool {
    input.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    fn replay(name: &str, target: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&corpus).expect("the corpus is a directory") {
            target(&fs::read(entry.expect("an input").path()).expect("an input is readable"));
            inputs += 1;
        }
        assert!(inputs > 0, "{} has no inputs", corpus.display());
    }

    #[test]
    fn packet_corpus() {
        replay("packet", super::packet);
    }

    #[test]
    fn header_corpus() {
        replay("header", super::header);
    }

    #[test]
    fn api_corpus() {
        replay("api", super::api);
    }

    #[test]
    fn file_corpus() {
        replay("file", super::file);
    }

    #[test]
    fn delta_corpus() {
        replay("delta", super::delta);
    }
}
