//! Manual pages as roff(7) reads them.

/// A page that grows from its beginning.
pub(crate) struct Page(Vec<String>);

impl Page {
    /// A page of the section 5 about what is called so.
    pub(crate) fn of_file(name: &str, what: &str) -> Self {
        let title = format!(".TH \"{}\" 5 \"\" \"anyport {}\"\n", escaped(name), env!("CARGO_PKG_VERSION"));
        let mut page = Self(vec![title]);
        page.section("NAME");
        page.0.push(format!("{} \\- {}\n", escaped(name), escaped(what)));
        page
    }

    pub(crate) fn section(&mut self, title: &str) {
        self.0.push(format!(".SH \"{title}\"\n"));
    }

    /// A paragraph, in which what stands between backticks is bold.
    pub(crate) fn text(&mut self, text: &str) {
        self.0.push(format!(".PP\n{}\n", marked(text)));
    }

    /// What something is called, and what it is.
    pub(crate) fn item(&mut self, name: &str, text: &str) {
        self.0.push(format!(".TP\n\\fB{}\\fR\n{}\n", escaped(name), marked(text)));
    }

    /// Lines as they stand.
    pub(crate) fn lines(&mut self, lines: &str) {
        let lines: String = lines.lines().map(|line| escaped(line) + "\n").collect();
        self.0.push(format!(".PP\n.nf\n{lines}.fi\n"));
    }

    pub(crate) fn see_also(&mut self, pages: &[(&str, &str)]) {
        self.section("SEE ALSO");
        let pages = pages.iter().map(|(name, section)| reference(name, section));
        self.0.push(pages.collect::<Vec<_>>().join(", ") + "\n");
    }

    pub(crate) fn into_text(self) -> String {
        self.0.concat()
    }
}

/// Another page, as it is referred to.
pub(crate) fn reference(name: &str, section: &str) -> String {
    format!("\\fB{}\\fR({section})", escaped(name))
}

/// A text that roff(7) takes as it is.
pub(crate) fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

fn marked(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts.map(|(at, part)| if at % 2 == 1 { format!("\\fB{}\\fR", escaped(part)) } else { escaped(part) }).collect()
}
