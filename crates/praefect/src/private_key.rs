//! A private key that stands in the configuration file itself, which is there so that it need not lie on a disk.
//!
//! What listens reads its key from a file, and looks whether the file has changed. So the key becomes one: in memory, without
//! a name, for as long as this process has it open, and for nobody else.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    path::PathBuf,
};

use rustix::fs::{MemfdFlags, Mode, fchmod, memfd_create};
use secrecy::{ExposeSecret as _, SecretString};

/// The key. Its path leads to it until this is dropped.
pub(crate) struct PrivateKey(File);

impl PrivateKey {
    pub(crate) fn new(key: &SecretString) -> io::Result<Self> {
        // Not for the process that takes over: that reads the configuration again.
        let mut file = File::from(memfd_create("tls.key", MemfdFlags::CLOEXEC)?);
        fchmod(&file, Mode::RUSR)?;
        file.write_all(key.expose_secret().as_bytes())?;
        Ok(Self(file))
    }

    /// For this process only.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_often_as_anybody_likes() {
        let key = PrivateKey::new(&"a key".to_owned().into()).unwrap();
        for _ in 0..2 {
            assert_eq!(std::fs::read_to_string(key.path()).unwrap(), "a key");
        }
        let path = key.path();
        assert!(std::fs::read_link(&path).unwrap().to_str().unwrap().contains("memfd"), "on no disk");
    }
}
