//! The page that the daemon serves, as a browser shows it.

use std::{fs, time::Duration};

use anyport_tests::{
    browser::Browser,
    dial::{expect_tcp_hello, tcp},
    host::wait_for,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Lab, at, trial};

const ADDRESS: &str = "127.0.0.1:9464";
const URL: &str = "http://127.0.0.1:9464/";
const DESK: (u32, u32) = (1280, 900);
const PHONE: (u32, u32) = (390, 844);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("page::shows what happens, and what is wrong", shown),
        trial("page::shows the past when it is opened", past),
        trial("page::has views of services and prefixes", views),
        trial("page::keeps rows in place until they are sorted", rows),
        trial("page::fits a phone and both schemes of colours", fits),
    ]
}

/// Services that work, one without a socket, and one whose upstream is down.
fn lab() -> Lab {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--metrics", ADDRESS]));
    for command in [
        "add-service web --handler hello",
        "add-service gone --handler registered",
        "add-service proxy --handler forward --upstream 203.0.113.3:9 --health-check=interval=100ms,fall=1",
        "add-prefix 192.0.2.0/24 2001:db8:a::/48 --service web",
        "add-prefix 203.0.113.64/26 --service gone",
        "add-prefix 203.0.113.128/25 --service proxy",
    ] {
        lab.daemon.ok(command);
    }
    lab
}

/// Connections that are served, and one that is dropped.
fn dial(lab: &Lab, connections: u8) {
    lab.topology.client.enter(|| {
        for host in 1..=connections {
            expect_tcp_hello(at(&format!("192.0.2.{host}"), 80));
        }
        drop(tcp(at("203.0.113.70", 80)));
    });
}

fn open(lab: &Lab, screen: (u32, u32)) -> Browser {
    let mut browser = Browser::start(&lab.topology.host);
    browser.show(URL, screen);
    browser.wait_until("document.querySelectorAll('#services tbody tr').length === 4");
    browser
}

/// The number of a tile.
fn tile(name: &str) -> String {
    format!(
        "[...document.querySelectorAll('#rates div')].find(it => it.innerText.startsWith('{name}')).lastChild.innerText"
    )
}

fn shown() {
    let mut lab = lab();
    let mut browser = open(&lab, DESK);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("the host's name");
    let title = browser.value("document.title").to_string();
    assert!(title.contains(host.trim()), "{title}");
    for name in ["steered/s", "dropped/s"] {
        wait_for(name, Duration::from_secs(20), || {
            dial(&lab, 20);
            let number = browser.value(&tile(name));
            if number.as_str().is_some_and(|it| it != "0" && it != "–") { Ok(()) } else { Err(number.to_string()) }
        });
    }
    browser.wait_until("document.querySelector('#state').textContent === 'degraded'");
    let degraded = browser.value("document.querySelector('#degraded').innerText").to_string();
    for part in ["the upstream 203.0.113.3:9 is down", "What to do: look whether the upstream runs", "docs/"] {
        assert!(degraded.contains(part), "{part}: {degraded}");
    }
    let upstreams = browser.value("document.querySelector('#upstreams tbody').innerText").to_string();
    assert!(upstreams.contains("203.0.113.3:9") && upstreams.contains("down"), "{upstreams}");
    lab.daemon.ok("drain 203.0.113.64/26");
    browser.wait_until("document.querySelector('#drained').innerText.includes('203.0.113.64/26')");
    assert_eq!(browser.errors(), [""; 0]);
    lab.daemon.stop();
    browser.wait_until("document.querySelector('#state').textContent.startsWith('no answer')");
}

/// What the daemon keeps is there as soon as a page is opened, by all and by service.
fn past() {
    let lab = lab();
    wait_for("points", Duration::from_secs(40), || {
        dial(&lab, 10);
        let text = lab.topology.host.run("curl", ["--silent", &format!("{URL}history.json?service=web")]);
        let history: Value = serde_json::from_str(&text).unwrap_or_default();
        let steered: Vec<f64> =
            history["series"]["steered"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        if steered.len() >= 3 && steered.iter().any(|it| *it > 0.0) { Ok(()) } else { Err(text) }
    });
    let status = |query: &str| {
        let url = format!("{URL}history.json{query}");
        lab.topology.host.run("curl", ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", &url])
    };
    assert_eq!([status("?service=none"), status("?x=1"), status("?since=0")], ["404", "400", "200"]);
    let mut browser = open(&lab, DESK);
    for hash in ["", "#/service/web"] {
        browser.value(&format!("location.hash = '{hash}'"));
        browser.wait_until("charts.get('packets').times.length >= 3");
        browser.wait_until("document.querySelector('#packets polyline.c0')");
        let highest = browser.value("Math.max(...charts.get('packets').lines[0][2])");
        assert!(highest.as_f64() > Some(0.0), "{hash}: {highest}");
    }
    let times = browser.value("[...document.querySelectorAll('#packets text')].map(it => it.textContent).join(' ')");
    assert!(times.as_str().is_some_and(|it| it.contains(':') && it.contains('0')), "axes: {times}");
    assert_eq!(browser.errors(), [""; 0]);
}

fn views() {
    let lab = lab();
    dial(&lab, 5);
    let mut browser = open(&lab, DESK);
    browser.value("document.querySelector('#services a[href=\"#/service/proxy\"]').click()");
    browser.wait_until("document.querySelector('#subject').innerText === 'service proxy'");
    let rows = "['services', 'prefixes', 'upstreams'].map(id => document.querySelectorAll(`#${id} tbody tr`).length)";
    assert_eq!(browser.value(rows), serde_json::json!([1, 1, 1]));
    browser.value("document.querySelector('#prefixes a').click()");
    browser.wait_until("document.querySelector('#subject').innerText === 'prefix 203.0.113.128/25'");
    assert_eq!(browser.value("document.querySelector('#bytes').hidden"), true, "no bytes are counted for a prefix");
    browser.wait_until("document.querySelector('#packets figcaption').innerText.includes('tcp to proxy')");
    browser.value("location.hash = '#/service/none'");
    browser.wait_until("document.querySelector('#note').innerText === 'There is no service of this name.'");
    browser.value("document.querySelector('#back a').click()");
    browser.wait_until("document.querySelectorAll('#services tbody tr').length === 4");
    assert_eq!(browser.errors(), [""; 0]);
}

fn rows() {
    let lab = lab();
    let mut browser = open(&lab, DESK);
    let names = "[...document.querySelectorAll('#prefixes tbody th')].map(it => it.innerText).join(' ')";
    let before = browser.value(names);
    browser.value("document.querySelectorAll('#prefixes tbody tr').forEach(it => it.isOld = true)");
    let last = before.as_str().and_then(|it| it.rsplit(' ').next()).expect("prefixes").to_owned();
    // It is the busiest now, and stays where it was.
    let busy =
        last.split('/').next().expect("an address").replace("::", "::7").replace(".0", ".9").replace(".64", ".70");
    let steered = format!(
        "[...document.querySelectorAll('#prefixes tbody tr')].find(it => it.innerText.startsWith('{last}')).innerText"
    );
    let idle = browser.value(&steered);
    wait_for("another number", Duration::from_secs(20), || {
        lab.topology.client.enter(|| (0..5).for_each(|_| drop(tcp(at(&busy, 80)))));
        let now = browser.value(&steered);
        if now == idle { Err(now.to_string()) } else { Ok(()) }
    });
    assert_eq!(browser.value(names), before);
    let is_kept = "[...document.querySelectorAll('#prefixes tbody tr')].every(it => it.isOld)";
    assert_eq!(browser.value(is_kept), true, "rows are updated, not made again");
    let sort = "[...document.querySelectorAll('#prefixes thead button')].find(it => it.innerText === 'prefix').click()";
    for direction in ["ascending", "descending"] {
        browser.value(sort);
        assert_eq!(browser.value("document.querySelector('#prefixes thead th').getAttribute('aria-sort')"), direction);
        let sorted = browser.value(names);
        let first = if direction == "ascending" { "192.0.2.0/24" } else { "2001:db8:a::/48" };
        assert!(sorted.as_str().is_some_and(|it| it.starts_with(first)), "{direction}: {sorted}");
    }
    browser.value(sort);
    assert_eq!(browser.value(names), before, "as before");
    browser.value(
        "document.querySelector('#search').value = '2001:'; \
         document.querySelector('#search').dispatchEvent(new Event('input'))",
    );
    assert_eq!(browser.value(names), "2001:db8:a::/48");
    assert_eq!(browser.errors(), [""; 0]);
}

/// The texts whose contrast is below 4.5 (WCAG AA), in words.
const FAINT: &str = "(() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => numbers(colour).slice(0, 3).map(it => it / 255)
        .map(it => it <= .04045 ? it / 12.92 : ((it + .055) / 1.055) ** 2.4)
        .reduce((sum, it, i) => sum + it * [.2126, .7152, .0722][i], 0);
    const behind = element => {
        const colour = getComputedStyle(element).backgroundColor;
        return numbers(colour)[3] === 0 ? behind(element.parentElement) : colour;
    };
    const faint = [];
    for (const it of document.querySelectorAll('body *')) {
        const own = [...it.childNodes].filter(node => node.nodeType === 3 && node.textContent.trim());
        if (!own.length || !it.getClientRects().length) continue;
        const style = getComputedStyle(it);
        const [high, low] = [light(it.closest('svg') ? style.fill : style.color), light(behind(it))].sort((a, b) => b - a);
        const contrast = (high + .05) / (low + .05);
        if (contrast < 4.5) faint.push(own[0].textContent.trim() + ' ' + contrast.toFixed(2));
    }
    return faint.join('; ');
})()";

fn fits() {
    let lab = lab();
    dial(&lab, 20);
    let mut browser = open(&lab, PHONE);
    for hash in ["", "#/service/proxy", "#/prefix/192.0.2.0%2F24"] {
        browser.value(&format!("location.hash = '{hash}'"));
        browser.wait_until("document.querySelectorAll('#rates div').length > 1");
        let width = browser.value("document.documentElement.scrollWidth");
        assert_eq!(width, PHONE.0, "{hash}: nothing is wider than the screen");
    }
    browser.value("location.hash = ''");
    browser.wait_until("document.querySelectorAll('#services tbody tr').length === 4");
    let end = browser.value("document.querySelector('#rates').getBoundingClientRect().bottom");
    assert!(end.as_f64() < Some(PHONE.1.into()), "the rates are on the first screen, not at {end}");
    let mut papers = Vec::new();
    for scheme in ["light", "dark"] {
        browser.prefer(scheme);
        papers.push(browser.value("getComputedStyle(document.body).backgroundColor"));
        assert_eq!(browser.value(FAINT), "", "{scheme}");
    }
    assert_ne!(papers[0], papers[1]);
    let unreachable = "[...document.querySelectorAll('.scroll')]\
        .filter(it => it.tabIndex !== 0 || it.getAttribute('role') !== 'region' || !it.getAttribute('aria-label')).length";
    assert_eq!(browser.value(unreachable), 0);
    assert_eq!(browser.value("document.querySelectorAll('main').length"), 1);
    assert_eq!(browser.value("document.querySelector('#state').getAttribute('aria-live')"), "polite");
    assert_eq!(browser.errors(), [""; 0]);
}
