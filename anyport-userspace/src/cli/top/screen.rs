//! The terminal as a screen to draw on.

use std::io::{self, Read as _, Stdin, Write as _, stdin, stdout};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::sys;

/// To the alternate screen, without cursor and without wrapping of lines; and back.
const OPEN: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const CLOSE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// A new line starts after the rest of the old one was cleared; and the rest of the screen.
const NEW_LINE: &str = "\x1b[K\r\n";
const CLEAR_REST: &str = "\x1b[J";
const HOME: &str = "\x1b[H";
/// Of a terminal that does not tell its size.
const USUAL: (usize, usize) = (24, 80);

/// What the user has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Has seen enough.
    Quit,
    /// Made the screen larger or smaller.
    Resized,
    /// Something that means nothing.
    Other,
}

/// The terminal, which is as it was before when this is dropped.
#[derive(Debug)]
pub(super) struct Screen {
    before: Option<Termios>,
    keys: Option<AsyncFd<Stdin>>,
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
        let keys = if before.is_some() { Some(sys::watch_readable(stdin())?) } else { None };
        let screen = Self { before, keys, resized, ends };
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

    /// Rows and columns.
    pub(super) fn size() -> io::Result<(usize, usize)> {
        let size = tcgetwinsize(stdout())?;
        Ok(match (size.ws_row, size.ws_col) {
            (0, _) | (_, 0) => USUAL,
            (rows, columns) => (rows.into(), columns.into()),
        })
    }

    /// Draws a text, as much of it as fits.
    pub(super) fn show(text: &str) -> io::Result<()> {
        let (rows, columns) = Self::size()?;
        let lines: Vec<&str> = text.lines().take(rows).map(|line| cut(line, columns)).collect();
        print(&format!("{HOME}{}\x1b[K{CLEAR_REST}", lines.join(NEW_LINE)))
    }

    /// Waits until the user does something.
    pub(super) async fn key(&mut self) -> io::Result<Key> {
        let Self { keys, resized, ends: [interrupt, terminate, hangup], .. } = self;
        tokio::select! {
            _ = interrupt.recv() => Ok(Key::Quit),
            _ = terminate.recv() => Ok(Key::Quit),
            _ = hangup.recv() => Ok(Key::Quit),
            _ = resized.recv() => Ok(Key::Resized),
            key = read(keys) => key,
        }
    }
}

async fn read(keys: &mut Option<AsyncFd<Stdin>>) -> io::Result<Key> {
    let Some(keys) = keys else { return std::future::pending().await };
    let mut ready = keys.readable().await?;
    // It is there, so that this does not wait.
    let mut typed = [0; 64];
    let length = stdin().read(&mut typed)?;
    ready.clear_ready();
    let is_end = length == 0 || typed[..length].iter().any(|key| matches!(key, b'q' | b'Q' | 0x03 | 0x04));
    Ok(if is_end { Key::Quit } else { Key::Other })
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

/// The first so many characters.
fn cut(line: &str, columns: usize) -> &str {
    line.char_indices().nth(columns).map_or(line, |(at, _)| &line[..at])
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn lines_are_cut_between_characters() {
        assert_eq!([cut("äöü", 2), cut("äöü", 3), cut("", 0), cut("a", 0)], ["äö", "äöü", "", ""]);
    }
}
