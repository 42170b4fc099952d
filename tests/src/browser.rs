//! A browser without a screen: Chromium by its `DevTools` protocol, over a pipe of its own.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    host::{Running, patience, wait_for},
    netns::Netns,
    prerequisites::scratch,
};

/// How long an answer may take; a browser that starts beside other tests is slow.
const PATIENCE: Duration = Duration::from_mins(1);

/// A browser with one page, which ends with it.
#[derive(Debug)]
pub struct Browser {
    _process: Running,
    requests: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    next: u64,
    /// What the page has complained of.
    errors: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// In this namespace, with an empty page.
    pub fn start(namespace: &Netns) -> Self {
        let profile = scratch();
        // It reads requests from its descriptor 3 and answers at 4.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >&2", "sh", "chromium", "--headless", "--no-sandbox"]);
        command.args(["--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]);
        command.args(["--disable-background-networking", "--disable-extensions", "--force-color-profile=srgb"]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).env("HOME", profile.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = Running(namespace.spawn(command));
        let requests = process.0.stdin.take().expect("a pipe");
        let answers = BufReader::new(process.0.stdout.take().expect("a pipe"));
        let (sender, messages) = channel();
        thread::spawn(move || {
            for message in answers.split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("JSON of the browser");
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self {
            _process: process,
            requests,
            messages,
            session: None,
            next: 0,
            errors: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", &attach);
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser
    }

    /// Has it do something, and returns the result.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut request = json!({"id": id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            request["sessionId"] = json!(session);
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).expect("a browser that listens");
        let end = Instant::now() + patience(PATIENCE);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut message = self.messages.recv_timeout(left).unwrap_or_else(|_| panic!("no answer to {method}"));
            if message["id"] == id {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].take();
            }
            self.errors.extend(complaint(&message));
        }
    }

    /// Shows what is at this address, on a screen of this size.
    pub fn show(&mut self, url: &str, (width, height): (u32, u32)) {
        let is_phone = width < 500;
        let screen = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone});
        self.call("Emulation.setDeviceMetricsOverride", &screen);
        let went = self.call("Page.navigate", &json!({"url": url}));
        assert!(went["errorText"].is_null(), "{url}: {went}");
        self.wait_until("document.readyState === 'complete'");
    }

    /// Prefers this scheme of colours: `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", &json!({"features": features}));
    }

    /// The value of an expression in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let what = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut result = self.call("Runtime.evaluate", &what);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].take()
    }

    /// Waits until an expression in the page is true.
    pub fn wait_until(&mut self, expression: &str) {
        wait_for(expression, Duration::from_secs(30), || match self.value(&format!("Boolean({expression})")) {
            Value::Bool(true) => Ok(()),
            _ => Err(self.value("document.body.innerText").to_string()),
        });
    }

    /// What is shown, as PNG in base64.
    pub fn picture(&mut self) -> String {
        let shot = self.call("Page.captureScreenshot", &json!({"format": "png"}));
        shot["data"].as_str().expect("a picture").to_owned()
    }

    /// What the page has complained of on its console so far.
    pub fn errors(&mut self) -> &[String] {
        // What was said before this answer has come.
        self.value("0");
        &self.errors
    }
}

/// An exception that nothing has caught, or an error on the console, also one of the browser's own.
fn complaint(message: &Value) -> Option<String> {
    let parameters = &message["params"];
    let is_error = match message["method"].as_str()? {
        "Runtime.exceptionThrown" => true,
        "Runtime.consoleAPICalled" => parameters["type"] == "error" || parameters["type"] == "warning",
        "Log.entryAdded" => parameters["entry"]["level"] == "error",
        _ => false,
    };
    is_error.then(|| parameters.to_string())
}
