//! A disk that loses what it may lose when the power fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, ErrorKind},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::store::Files;

/// What is found on a disk: files by name.
pub(crate) type Disk = BTreeMap<String, Vec<u8>>;

/// Shared by all its clones, as a directory is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Simulated(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    /// As programs see it: the number of the file that has a name.
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    /// The names that are on the disk, and what has happened to names since, any part of which may be there too.
    on_disk: BTreeMap<String, usize>,
    pending: Vec<Entry>,
    /// Each disk that might have been found, while that is recorded.
    recorded: Option<BTreeSet<Disk>>,
    /// After so many more steps everything fails.
    fails_after: Option<usize>,
}

/// A name that has come to stand for a file, or for none.
#[derive(Clone, Debug)]
struct Entry(String, Option<usize>);

impl Simulated {
    pub(crate) fn with(disk: &Disk) -> Self {
        let simulated = Self::default();
        {
            let mut shared = simulated.shared();
            for (name, content) in disk {
                let number = shared.files.len();
                shared.files.push(content.clone());
                shared.names.insert(name.clone(), number);
                shared.on_disk.insert(name.clone(), number);
            }
        }
        simulated
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap()
    }

    /// Has everything fail after so many steps; nothing, or nothing any more.
    pub(crate) fn fail_after(&self, steps: Option<usize>) {
        self.shared().fails_after = steps;
    }

    /// From now on, notes each disk that may be found if the power fails.
    pub(crate) fn record(&self) {
        self.shared().recorded = Some(BTreeSet::new());
    }

    pub(crate) fn recorded(&self) -> BTreeSet<Disk> {
        self.shared().recorded.take().unwrap_or_default()
    }

    /// Each disk that would be found if the power failed now.
    pub(crate) fn disks(&self) -> BTreeSet<Disk> {
        self.shared().disks()
    }
}

impl Shared {
    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.fails_after {
            *left = left.checked_sub(1).ok_or(ErrorKind::StorageFull)?;
        }
        Ok(())
    }

    fn find(&self, name: &str) -> io::Result<usize> {
        self.names.get(name).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn set(&mut self, name: &str, file: Option<usize>) {
        match file {
            Some(file) => self.names.insert(name.to_owned(), file),
            None => self.names.remove(name),
        };
        self.pending.push(Entry(name.to_owned(), file));
        self.note();
    }

    /// Any part of what has happened to the names may be on the disk, in whatever order it got there.
    fn disks(&self) -> BTreeSet<Disk> {
        let mut disks = BTreeSet::new();
        let entries = self.pending.len();
        assert!(entries <= 8, "too many names that are not on the disk: {:?}", self.pending);
        for part in 0..1_usize << entries {
            let chosen: Vec<_> =
                self.pending.iter().enumerate().filter(|(i, _)| part >> i & 1 == 1).map(|(_, it)| it).collect();
            let mut names = self.on_disk.clone();
            let mut reversed = names.clone();
            for entry in &chosen {
                put(&mut names, entry);
            }
            for entry in chosen.iter().rev() {
                put(&mut reversed, entry);
            }
            for names in [names, reversed] {
                disks.insert(names.into_iter().map(|(name, file)| (name, self.files[file].clone())).collect());
            }
        }
        disks
    }

    fn note(&mut self) {
        if self.recorded.is_some() {
            let disks = self.disks();
            self.recorded.get_or_insert_default().extend(disks);
        }
    }
}

fn put(names: &mut BTreeMap<String, usize>, Entry(name, file): &Entry) {
    match file {
        Some(file) => names.insert(name.clone(), *file),
        None => names.remove(name),
    };
}

impl Files for Simulated {
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let shared = self.shared();
        Ok(shared.files[shared.find(name)?].clone())
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut shared = self.shared();
        shared.step()?;
        // A file that is there is cut to nothing first, also where another name refers to it too.
        let file = shared.find(name).unwrap_or_else(|_| {
            shared.files.push(Vec::new());
            let file = shared.files.len() - 1;
            shared.set(name, Some(file));
            file
        });
        // Before all is on the disk, there may be a part of it, or zeros where it will be.
        if shared.recorded.is_some() {
            for len in 0..content.len() {
                shared.files[file] = content[..len].to_vec();
                shared.note();
            }
            shared.files[file] = vec![0; content.len()];
            shared.note();
        }
        shared.files[file] = content[..content.len() / 2].to_vec();
        shared.step()?;
        shared.files[file] = content.to_vec();
        shared.note();
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut shared = self.shared();
        shared.step()?;
        let file = shared.find(from)?;
        shared.set(to, Some(file));
        shared.set(from, None);
        Ok(())
    }

    fn link(&self, name: &str, second: &str) -> io::Result<()> {
        let mut shared = self.shared();
        shared.step()?;
        let file = shared.find(name)?;
        if shared.names.contains_key(second) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        shared.set(second, Some(file));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut shared = self.shared();
        shared.step()?;
        shared.find(name)?;
        shared.set(name, None);
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.shared().names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        let mut shared = self.shared();
        shared.step()?;
        shared.on_disk = shared.names.clone();
        shared.pending.clear();
        shared.note();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/simulated").join(name)
    }
}
