//! A directory that is removed when it is dropped.

use std::fs::{self, DirBuilder};
use std::io;
use std::path::{Path, PathBuf};

/// A new directory among the system's temporary ones that nobody else may look into.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(purpose: &str) -> io::Result<Self> {
        // Nobody's who was here before, and short: a Unix socket's whole path has some 100 bytes.
        let name = format!("{purpose}-{:08x}", fastrand::u32(..));
        let path = std::env::temp_dir().join(name);
        let mut builder = DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to be told if it fails.
        let _ = fs::remove_dir_all(&self.0);
    }
}
