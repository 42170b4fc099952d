//! Whether what the daemon says of its control API is true: all of it is asked for, well and badly, and each answer has a status and
//! a body that the description has for it.

use std::{collections::BTreeSet, fs, os::unix::fs::chown};

use anyport_tests::{
    dial::expect_tcp_hello,
    http::{self, Answer},
    prerequisites::{GROUP, USER, program, scratch},
    schema::Schemas,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    cases::{Lab, at, trial},
    events::Ear,
};

/// What must be done, in this order: operation, query and body. Names in paths are `edge`.
const GOOD: &[(&str, &str, &str)] = &[
    ("post_services", "", FORWARD),
    ("post_services", "", r#"{"name":"owned","handler":"registered","owners":["user:root"],"fallback":"default"}"#),
    ("post_services", "", r#"{"name":"trap","handler":"discard","banner":"hi","connection-log":10}"#),
    ("post_prefixes", "", RULE),
    ("post_prefixes", "", r#"{"prefixes":["2001:db8:0:a::/64"]}"#),
    ("post_apply", "dry-run=true&prune=true&force=true", "192.0.2.128/25 tcp 443\n"),
    ("post_apply", "confirm=60", "192.0.2.128/25 tcp 443\n"),
    ("get_status", "", ""),
    ("post_confirm", "", ""),
    ("post_drain", "", r#"{"prefixes":["192.0.2.128/25"],"wait":3600}"#),
    ("post_drain", "", r#"{"service":"edge","wait":0}"#),
    ("get_status", "", ""),
    ("get_live", "", ""),
    ("get_prefixes", "", ""),
    ("get_services", "", ""),
    ("get_drain", "", ""),
    ("get_explain", "to=192.0.2.7:80", ""),
    ("get_explain", "to=192.0.2.7:80&from=198.51.100.9:1234&via=client", ""),
    ("get_explain", "to=198.51.100.2:22&protocol=udp", ""),
    ("delete_drain", "", r#"{"prefixes":["192.0.2.128/25"]}"#),
    ("delete_drain", "", "{}"),
    ("get_progress", "", ""),
    ("post_reload", "dry-run=true&force=true", ""),
    ("post_reload", "", ""),
    ("get_openapi_json", "", ""),
    (
        "delete_prefixes",
        "",
        r#"{"prefixes":["192.0.2.0/24"],"protocol":"both","ports":"80,443","except":"443","source":"198.51.100.0/24",
            "service":"edge"}"#,
    ),
    ("delete_services_name", "", ""),
];
const FORWARD: &str = r#"{"name":"edge","handler":"forward","upstreams":["203.0.113.2:80","origin.example:*"],
    "max-connections":7,"max-connections-per-source":3,"accept-rate-per-source":"5/s","source-allow":["198.51.100.0/24"],
    "source-deny":["198.51.100.66/32"],"mark":"0x10","balance":"source-hash","proxy-protocol":"v2",
    "accept-proxy":["198.51.100.8/32"],"connect-timeout":"1s","retries":0,"idle-timeout":"1m","max-duration":"1h",
    "on-down":"close","health-check":{"interval":"1s","port":80},"ejection":{"failures":0},"resolve-interval":"5s",
    "tcp":{"nodelay":false,"send-buffer":65536},"udp":{"on-down":"keep","responses":1}}"#;
const RULE: &str = r#"{"prefixes":["192.0.2.0/24"],"protocol":"both","ports":"80,443","except":"443",
    "source":"198.51.100.0/24","service":"edge","route":true,"force":true}"#;

/// What is refused for what is there, or is not: operation, query, body and status.
const REFUSED: &[(&str, &str, &str, u16)] = &[
    ("post_prefixes", "", r#"{"prefixes":["203.0.113.64/26"],"service":"absent"}"#, 404),
    ("post_prefixes", "", r#"{"prefixes":["192.0.2.0/24"],"ports":"8080","service":"other"}"#, 409),
    ("post_prefixes", "", r#"{"prefixes":["198.51.100.0/30"]}"#, 428),
    ("delete_prefixes", "", r#"{"prefixes":["203.0.113.64/26"]}"#, 404),
    ("post_apply", "", "192.0.2.0/24 tcp 8080 service=other\n", 409),
    ("post_apply", "", "192.0.2.128/25 tcp 443 service=absent\n", 404),
    ("post_apply", "", "198.51.100.0/30 tcp\n", 428),
    ("post_confirm", "", "", 404),
    ("post_drain", "", r#"{"service":"absent"}"#, 404),
    ("delete_drain", "", r#"{"service":"other"}"#, 404),
    ("get_events", "service=absent", "", 404),
    ("get_events", "prefix=192.0.2.0/24&source=::/0", "", 400),
    ("get_explain", "to=192.0.2.7:80&protocol=both", "", 400),
    ("get_explain", "to=192.0.2.7:80&via=none", "", 404),
    ("post_services", "", r#"{"name":"other","handler":"hello"}"#, 409),
    ("post_services", "", r#"{"name":"two","handler":"echo","banner":"x"}"#, 400),
    ("delete_services_name", "", "", 404),
    ("post_takeover", "", r#"{"executable":"/absent"}"#, 500),
];

const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("described::what is done", good),
        trial("described::what is refused", refused),
        trial("described::malformed bodies", bodies),
        trial("described::malformed queries", queries),
        trial("described::malformed headers", headers),
        trial("described::methods and paths", methods),
    ]
}

/// A daemon and its description.
struct Api {
    lab: Lab,
    document: Value,
    _directory: TempDir,
}

/// A request that is described.
#[derive(Clone, Copy)]
struct Operation<'a> {
    path: &'a str,
    method: &'a str,
    description: &'a Value,
}

impl<'a> Operation<'a> {
    fn id(self) -> &'a str {
        self.description["operationId"].as_str().expect("an id")
    }

    fn request(self, query: &str, body: &str) -> Vec<u8> {
        let mark = if query.is_empty() { "" } else { "?" };
        let target = format!("{}{mark}{query}", self.path.replace("{name}", "edge"));
        http::bytes(&self.method.to_uppercase(), &target, body.as_bytes())
    }

    /// The schema of a body that is JSON.
    fn body(self) -> Option<&'a Value> {
        self.description["requestBody"]["content"].get("application/json").map(|it| &it["schema"])
    }

    /// The parts of the query, each with its schema.
    fn query(self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let parameters = self.description["parameters"].as_array().into_iter().flatten();
        let parameters = parameters.filter(|it| it["in"] == "query");
        parameters.map(|it| (it["name"].as_str().expect("a name"), it))
    }
}

impl Api {
    /// A new daemon that has some of all that answers tell.
    fn new() -> Self {
        let directory = scratch();
        chown(directory.path(), Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
        let config = format!(
            "[announce]\nprefixes = [\"192.0.2.0/24\", \"203.0.113.128/25\"]\nfile = \"{}/list\"\nformat = \"list\"\n\
             [[service]]\nname = \"other\"\nhandler = \"echo\"\n\
             [[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"8080\"\n",
            directory.path().display()
        );
        let file = directory.path().join("anyport.toml");
        fs::write(&file, config).expect("a configuration");
        let lab = Lab::with("sk-lookup", |setup| setup.config(file));
        let (status, text) = http::request(&lab.daemon.socket(), "GET", "/v1/openapi.json", b"");
        assert_eq!(status, 200, "{text}");
        Self { lab, document: serde_json::from_str(&text).expect("JSON"), _directory: directory }
    }

    fn operations(&self) -> impl Iterator<Item = Operation<'_>> {
        self.document["paths"].as_object().expect("paths").iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().expect("methods").iter();
            methods.map(move |(method, description)| Operation { path, method, description })
        })
    }

    fn operation(&self, id: &str) -> Operation<'_> {
        self.operations().find(|it| it.id() == id).unwrap_or_else(|| panic!("{id} is not described"))
    }

    fn schemas(&self) -> Schemas<'_> {
        Schemas(&self.document)
    }

    /// Asks, and expects that the answer is described.
    fn ask(&self, operation: Operation<'_>, request: &[u8]) -> (u16, Value) {
        let asked = request.escape_ascii();
        let Answer { status, body, .. } = http::exchange(&self.lab.daemon.socket(), request);
        let responses = &operation.description["responses"];
        let response = self.schemas().resolve(&responses[status.to_string()]);
        let schema = &response["content"]["application/json"]["schema"];
        assert!(schema.is_object(), "{asked}: {status} is not described: {body}");
        let value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{asked}: {error}: {body}"));
        self.schemas().check(schema, &value).unwrap_or_else(|why| panic!("{asked}: {why}: {value}"));
        (status, value)
    }

    /// Asks, and expects to be told that the request makes no sense.
    fn expect_invalid(&self, operation: Operation<'_>, request: &[u8]) -> String {
        let (status, answer) = self.ask(operation, request);
        assert_eq!(status, 400, "{}: {answer}", request.escape_ascii());
        answer["error"].as_str().expect("an error").to_owned()
    }

    /// Whether the body that is described is what the schema says.
    fn fits(&self, schema: &Value, value: &Value) -> bool {
        Schemas(&self.document).check(schema, value).is_ok()
    }
}

fn good() {
    let api = Api::new();
    let mut ear = Ear::new(&api.lab.daemon, "");
    let mut done = BTreeSet::from(["get_events", "post_takeover"]);
    for &(id, query, body) in GOOD {
        let operation = api.operation(id);
        if let Some(schema) = operation.body() {
            let body = serde_json::from_str(body).expect("JSON");
            api.schemas().check(schema, &body).unwrap_or_else(|why| panic!("{id}: {why}: {body}"));
        }
        let (status, answer) = api.ask(operation, &operation.request(query, body));
        assert_eq!(status, 200, "{id} {query} {body}: {answer}");
        done.insert(id);
    }
    assert_eq!(done, api.operations().map(Operation::id).collect(), "what was asked for, and what is described");
    api.lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.1", 8080)));
    let content = &api.operation("get_events").description["responses"]["200"]["content"];
    let line = &content["application/x-ndjson"]["schema"]["items"];
    for kind in ["\"verb\"", "\"outcome\""] {
        let value = ear.next_with(|line| line.contains(kind));
        api.schemas().check(line, &value).unwrap_or_else(|why| panic!("{why}: {value}"));
    }
    // Last, since another process answers from then on.
    let own = program("anyportd").expect("the daemon");
    let takeover = api.operation("post_takeover");
    let (status, answer) = api.ask(takeover, &takeover.request("", &json!({"executable": own}).to_string()));
    assert_eq!(status, 200, "{answer}");
}

fn refused() {
    let api = Api::new();
    for &(id, query, body, expected) in REFUSED {
        let operation = api.operation(id);
        let (status, answer) = api.ask(operation, &operation.request(query, body));
        assert_eq!(status, expected, "{id} {query} {body}: {answer}");
    }
    let operation = api.operation("post_services");
    let (status, answer) = api.ask(operation, &operation.request("", &" ".repeat((1 << 20) + 1)));
    assert_eq!(status, 413, "{answer}");
}

/// What schemas do not have, the daemon does not take; and it knows no field that they lack.
fn bodies() {
    let api = Api::new();
    for operation in api.operations() {
        let (id, Some(schema)) = (operation.id(), operation.body()) else { continue };
        let schema = api.schemas().resolve(schema);
        let invalid = |body: &str| api.expect_invalid(operation, &operation.request("", body));
        for body in ["", "{", "[]", "7", "null"] {
            invalid(body);
        }
        let fields = schema["properties"].as_object().expect("fields");
        let unknown = invalid(r#"{"colour":"red"}"#);
        assert_eq!(names_of(&unknown), fields.keys().map(String::as_str).collect(), "{id}: {unknown}");
        let body: Value = serde_json::from_str(body_of(id)).expect("JSON");
        for name in schema["required"].as_array().into_iter().flatten() {
            let mut body = body.clone();
            body.as_object_mut().expect("an object").remove(name.as_str().expect("a name"));
            let error = invalid(&body.to_string());
            assert!(error.contains("missing"), "{id} without {name}: {error}");
        }
        for (name, schema) in fields {
            let mut values = [json!(7), json!("x"), json!(-1)].into_iter();
            let wrong = values.find(|it| !api.fits(schema, it)).expect("a value that does not fit");
            let mut body = body.clone();
            body[name] = wrong;
            let error = invalid(&body.to_string());
            assert!(!error.contains("unknown field"), "{id} {name}: {error}");
        }
    }
}

/// The same for queries.
fn queries() {
    let api = Api::new();
    for operation in api.operations() {
        let invalid = |query: &str| api.expect_invalid(operation, &operation.request(query, ""));
        let parts: Vec<_> = operation.query().collect();
        if !parts.is_empty() {
            let error = invalid("colour=red");
            assert_eq!(names_of(&error), parts.iter().map(|(name, _)| *name).collect(), "{error}");
        }
        for (name, part) in &parts {
            let others = parts.iter().filter(|(it, part)| it != name && part["required"] == true);
            let others = others.map(|(name, part)| format!("{name}={}&", sample(&api, &part["schema"])));
            let others = others.collect::<Vec<_>>().concat();
            if part["required"] == true {
                let error = invalid(&others);
                assert!(error.contains("missing"), "{error}");
            }
            if part["schema"]["type"] != "string" {
                invalid(&format!("{others}{name}=%20"));
            }
            if operation.method == "get" {
                // HEAD, since events have no end.
                let query = format!("{others}{name}={}", sample(&api, &part["schema"]));
                let request = Operation { method: "head", ..operation }.request(&query, "");
                let Answer { status, .. } = http::exchange(&api.lab.daemon.socket(), &request);
                assert_eq!(status, 200, "{} {query}", operation.id());
            }
        }
    }
}

/// The same for the headers of commands.
fn headers() {
    let api = Api::new();
    for operation in api.operations().filter(|it| it.method != "get") {
        for header in
            ["X-Anyport-First: soon", "X-Anyport-Request: ", &format!("X-Anyport-Request: {}", "x".repeat(65))]
        {
            let request = String::from_utf8(operation.request("", body_of(operation.id()))).expect("a text");
            let request = request.replacen("\r\n", &format!("\r\n{header}\r\n"), 1);
            api.expect_invalid(operation, request.as_bytes());
        }
    }
}

/// A value that a part of a query can have.
fn sample(api: &Api, schema: &Value) -> String {
    let schema = schema.get("anyOf").map_or(schema, |choices| &choices[0]);
    let schema = api.schemas().resolve(schema);
    let words = [&schema["examples"][0], &schema["enum"][0], &schema["oneOf"][0]["const"]];
    match words.into_iter().find_map(Value::as_str) {
        Some(word) => word.to_owned(),
        None if schema["type"] == "integer" => "1".to_owned(),
        None if schema["type"] == "string" => "lo".to_owned(),
        None => panic!("no sample of {schema}"),
    }
}

/// A body with which an operation is asked for elsewhere.
fn body_of(id: &str) -> &'static str {
    GOOD.iter().find(|it| it.0 == id).map_or(r#"{"executable":"/absent"}"#, |it| it.2)
}

/// What a message about an unknown field names in its place.
fn names_of(error: &str) -> BTreeSet<&str> {
    let (_, expected) = error.split_once(", expected ").unwrap_or_else(|| panic!("no names: {error}"));
    expected.split('`').skip(1).step_by(2).collect()
}

/// Each path takes the methods that are described and no others, and docs/api.md has the same ones.
fn methods() {
    let api = Api::new();
    for (path, described) in api.document["paths"].as_object().expect("paths") {
        let has = |method: &str| described.get(method.to_lowercase()).is_some();
        let target = path.replace("{name}", "edge");
        for method in METHODS.into_iter().filter(|it| !has(it)) {
            let answer = http::exchange(&api.lab.daemon.socket(), &http::bytes(method, &target, b""));
            assert_eq!(answer.status, 405, "{method} {target}: {}", answer.body);
            let allowed = answer.head.lines().find_map(|line| line.strip_prefix("allow: ")).expect("the header Allow");
            let allowed: BTreeSet<_> = allowed.split(',').filter(|it| *it != "HEAD").collect();
            assert_eq!(allowed, METHODS.into_iter().filter(|it| has(it)).collect(), "{method} {target}");
        }
    }
    let (status, _) = http::request(&api.lab.daemon.socket(), "GET", "/v1/absent", b"");
    assert_eq!(status, 404);
    let text = include_str!("../../docs/api.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let rows = rows.filter(|row| row.contains(" /v1/"));
    let documented: BTreeSet<_> =
        rows.map(|row| row.split('?').next().unwrap_or(row).replace("NAME", "{name}")).collect();
    let described = api.operations().map(|it| format!("{} {}", it.method.to_uppercase(), it.path)).collect();
    assert_eq!(documented, described, "docs/api.md, and the description");
}
