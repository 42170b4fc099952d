//! What shells need beyond what `clap_complete` does for them.

use std::{ffi::OsString, io, io::Write, path::Path};

use clap::Command;
use clap_complete::{
    engine,
    env::{self, EnvCompleter},
};

/// bash breaks words at `:` and `=` too, which addresses and options have in them, and replaces what is behind the last of these.
pub(super) struct Bash;

impl EnvCompleter for Bash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn is(&self, name: &str) -> bool {
        name == self.name()
    }

    fn write_registration(&self, var: &str, name: &str, bin: &str, asked: &str, out: &mut dyn Write) -> io::Result<()> {
        write!(
            out,
            r#"_{name}() {{
    local words=("${{COMP_WORDS[@]:0:COMP_CWORD+1}}")
    # As far as the cursor; nothing behind a : or =.
    [[ -z $2 ]] || words[COMP_CWORD]=$2
    mapfile -t COMPREPLY < <({var}=bash {asked} -- "${{words[@]}}" 2>/dev/null)
}}
complete -o bashdefault -o default -o nosort -F _{name} {bin}
"#
        )
    }

    fn write_complete(
        &self,
        command: &mut Command,
        words: Vec<OsString>,
        _: Option<&Path>,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let last = words.last().cloned().unwrap_or_default();
        let words = whole_words(words);
        let index = words.len().saturating_sub(1);
        let whole = words.last().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
        let kept =
            if is_break(&last) { &whole } else { whole.strip_suffix(&*last.to_string_lossy()).unwrap_or_default() };
        for candidate in engine::complete(command, words, index, None)? {
            let text = candidate.get_value().to_string_lossy();
            // Files are left to bash, which quotes their names; it looks for them where nothing is offered.
            let is_option_unasked = whole.is_empty() && text.starts_with('-');
            if !is_option_unasked && !text.starts_with('/') {
                writeln!(out, "{}", text.strip_prefix(kept).unwrap_or(&text))?;
            }
        }
        Ok(())
    }
}

/// Puts words together again that bash has broken.
pub(super) fn whole_words(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut whole: Vec<OsString> = Vec::new();
    let mut goes_on = false;
    for word in words {
        let is_break = is_break(&word);
        match whole.last_mut() {
            Some(last) if goes_on || is_break => last.push(&word),
            _ => whole.push(word),
        }
        goes_on = is_break;
    }
    whole
}

fn is_break(word: &OsString) -> bool {
    !word.is_empty() && word.as_encoded_bytes().iter().all(|byte| b":=".contains(byte))
}

/// zsh runs the file itself when Tab is pressed for the first time, and expects an answer then, too.
pub(super) struct Zsh;

impl EnvCompleter for Zsh {
    fn name(&self) -> &'static str {
        env::Zsh.name()
    }

    fn is(&self, name: &str) -> bool {
        env::Zsh.is(name)
    }

    fn write_registration(&self, var: &str, name: &str, bin: &str, asked: &str, out: &mut dyn Write) -> io::Result<()> {
        env::Zsh.write_registration(var, name, bin, asked, out)?;
        writeln!(out, "if [[ $funcstack[1] == _{bin} ]]; then _clap_dynamic_completer_{name}; fi")
    }

    fn write_complete(
        &self,
        command: &mut Command,
        words: Vec<OsString>,
        directory: Option<&Path>,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        env::Zsh.write_complete(command, words, directory, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_bash_breaks_are_put_together() {
        for (broken, whole) in [
            ("a b", "a b"),
            ("a --service = b", "a --service=b"),
            ("a 2001 : db8 :: /32 b", "a 2001:db8::/32 b"),
            ("a --within = 2001 :", "a --within=2001:"),
        ] {
            let words = whole_words(broken.split(' ').map(OsString::from));
            assert_eq!(words, whole.split(' ').map(OsString::from).collect::<Vec<_>>());
        }
    }
}
