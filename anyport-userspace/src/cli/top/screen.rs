//! The terminal as a screen to draw on.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Stdin, Write as _, stdin, stdout},
};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    cli::tone::{apart, painted},
    sys,
};

/// To the alternate screen, without cursor and without wrapping of lines; and back.
const OPEN: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const CLOSE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// A new line starts after the rest of the old one was cleared; and the rest of the screen.
const NEW_LINE: &str = "\x1b[K\r\n";
const CLEAR_REST: &str = "\x1b[J";
const HOME: &str = "\x1b[H";

/// What the user has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Ctrl-C, Ctrl-D, a signal, or the end of the terminal.
    End,
    /// Made the screen larger or smaller.
    Resized,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    Escape,
    Enter,
    Backspace,
    Character(char),
}

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Size {
    /// Of a terminal that does not tell its size.
    const USUAL: Self = Self { rows: 24, columns: 80 };

    /// As it is now.
    pub(super) fn of_terminal() -> io::Result<Self> {
        let size = tcgetwinsize(stdout())?;
        Ok(match (size.ws_row, size.ws_col) {
            (0, _) | (_, 0) => Self::USUAL,
            (rows, columns) => Self { rows: rows.into(), columns: columns.into() },
        })
    }

    /// Draws a text, as much of it as fits.
    pub(super) fn draw(self, text: &str, in_colours: bool) -> io::Result<()> {
        let lines: Vec<&str> = text.lines().take(self.rows).map(|line| cut(line, self.columns)).collect();
        let text = painted(&lines.join("\n"), in_colours).replace('\n', NEW_LINE);
        print(&format!("{HOME}{text}\x1b[K{CLEAR_REST}"))
    }
}

/// The terminal, which is as it was before when this is dropped.
#[derive(Debug)]
pub(super) struct Screen {
    before: Option<Termios>,
    keyboard: Option<AsyncFd<Stdin>>,
    /// Typed, and not looked at yet.
    typed: VecDeque<Key>,
    resized: Signal,
    ends: [Signal; 3],
}

impl Screen {
    /// Takes the terminal. Without one as standard input there are no keys, and signals end it.
    pub(super) fn open() -> io::Result<Self> {
        let ends = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        let [interrupt, terminate, hangup] = ends;
        let ends = [interrupt?, terminate?, hangup?];
        let resized = signal(SignalKind::window_change())?;
        let before = tcgetattr(stdin()).ok();
        let keyboard = if before.is_some() { Some(sys::watch_readable(stdin())?) } else { None };
        let screen = Self { before, keyboard, typed: VecDeque::new(), resized, ends };
        if let Some(before) = &screen.before {
            let mut modes = before.clone();
            // Keys come one by one and unseen. A stopped program would leave the terminal as it is.
            modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            modes.special_codes[SpecialCodeIndex::VSUSP] = 0;
            tcsetattr(stdin(), OptionalActions::Now, &modes)?;
        }
        print(OPEN)?;
        Ok(screen)
    }

    /// Waits until the user does something.
    pub(super) async fn key(&mut self) -> io::Result<Key> {
        loop {
            if let Some(key) = self.typed.pop_front() {
                return Ok(key);
            }
            let Self { keyboard, resized, ends: [interrupt, terminate, hangup], .. } = self;
            let typed = tokio::select! {
                _ = interrupt.recv() => return Ok(Key::End),
                _ = terminate.recv() => return Ok(Key::End),
                _ = hangup.recv() => return Ok(Key::End),
                _ = resized.recv() => return Ok(Key::Resized),
                typed = read(keyboard) => typed?,
            };
            self.typed.extend(typed);
        }
    }
}

async fn read(keyboard: &mut Option<AsyncFd<Stdin>>) -> io::Result<Vec<Key>> {
    let Some(keyboard) = keyboard else { return std::future::pending().await };
    let mut ready = keyboard.readable().await?;
    // It is there, so that this does not wait.
    let mut typed = [0; 64];
    let length = stdin().read(&mut typed)?;
    ready.clear_ready();
    Ok(if length == 0 { vec![Key::End] } else { keys(&String::from_utf8_lossy(&typed[..length])) })
}

/// What a terminal sends for keys: characters, and sequences that begin with an escape.
fn keys(typed: &str) -> Vec<Key> {
    const SEQUENCES: [(&str, Key); 9] = [
        ("\x1b[A", Key::Up),
        ("\x1bOA", Key::Up),
        ("\x1b[B", Key::Down),
        ("\x1bOB", Key::Down),
        ("\x1b[5~", Key::PageUp),
        ("\x1b[6~", Key::PageDown),
        ("\x1b[H", Key::Home),
        ("\x1bOH", Key::Home),
        ("\x1b[1~", Key::Home),
    ];
    let (mut rest, mut keys) = (typed, Vec::new());
    while let Some(first) = rest.chars().next() {
        if let Some((sequence, key)) = SEQUENCES.iter().find(|(sequence, _)| rest.starts_with(sequence)) {
            keys.push(*key);
            rest = &rest[sequence.len()..];
            continue;
        }
        rest = &rest[first.len_utf8()..];
        keys.push(match first {
            '\x03' | '\x04' => Key::End,
            '\r' | '\n' => Key::Enter,
            '\x08' | '\x7f' => Key::Backspace,
            // A sequence that means nothing here: to its final byte.
            '\x1b' if rest.starts_with(['[', 'O']) => {
                let end = rest[1..].find(|it: char| ('@'..='~').contains(&it)).map_or(rest.len(), |at| at + 2);
                rest = &rest[end..];
                continue;
            }
            '\x1b' => Key::Escape,
            other if other.is_control() => continue,
            other => Key::Character(other),
        });
    }
    keys
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        print(CLOSE).ok();
        if let Some(before) = &self.before {
            tcsetattr(stdin(), OptionalActions::Now, before).ok();
        }
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The first so many characters, beside the mark of the line's tone, which takes none.
fn cut(line: &str, columns: usize) -> &str {
    let columns = columns + apart(line).0.chars().count();
    line.char_indices().nth(columns).map_or(line, |(at, _)| &line[..at])
}

#[cfg(test)]
mod tests {
    use super::{Key, cut, keys};
    use crate::cli::tone::Tone;

    #[test]
    fn lines_are_cut_between_characters() {
        assert_eq!([cut("äöü", 2), cut("äöü", 3), cut("", 0), cut("a", 0)], ["äö", "äöü", "", ""]);
        assert_eq!(cut(&Tone::Bad.line("äöü"), 2), Tone::Bad.line("äö"));
    }

    #[test]
    fn keys_come_as_characters_and_sequences() {
        use Key::{Backspace, Character, Down, End, Enter, Escape, Home, PageDown, PageUp, Up};
        for (typed, expected) in [
            ("q", vec![Character('q')]),
            ("/ä\r", vec![Character('/'), Character('ä'), Enter]),
            ("\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H", vec![Up, Down, PageUp, PageDown, Home]),
            ("\x1b", vec![Escape]),
            ("\x7f\x03", vec![Backspace, End]),
            // F5, which means nothing, does not type its letters.
            ("\x1b[15~x", vec![Character('x')]),
            ("\x1b[", vec![]),
        ] {
            assert_eq!(keys(typed), expected, "{typed:?}");
        }
    }
}
