//! Files and folders that are either whole or not there, whenever the process is killed.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What is being written, and what makes room for it, begin with these.
const FRESH: &str = ".writing-";
const OLD: &str = ".old-";

/// Writes a file under another name, and renames it when it is on the disk.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some(name) = path.file_name() else { bail!("{} names no file", path.display()) };
    let fresh = path.with_file_name(format!("{}.writing", name.to_string_lossy()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| {
        format!("cannot write {}; does its folder exist, and is there room?", path.display())
    })
}

/// Fills a folder beside its place and renames it. A folder that has the place stays until the new one has it;
/// [`settle`] finishes what a kill between the two interrupts.
pub fn put_folder(folder: &Path, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    settle(folder)?;
    let (place, fresh) = (folder.join(name), folder.join(format!("{FRESH}{name}")));
    fs::create_dir_all(&fresh)?;
    fill(&fresh)?;
    File::open(&fresh)?.sync_all()?;
    let old = folder.join(format!("{OLD}{name}"));
    let had = place.exists();
    if had {
        fs::rename(&place, &old)?;
    }
    fs::rename(&fresh, &place)?;
    File::open(folder)?.sync_all()?;
    if had {
        fs::remove_dir_all(&old)?;
    }
    Ok(())
}

/// Clears up behind an interrupted [`put_folder`]: what was not finished goes, because it may fill the disk, and a
/// folder that made room for one that never came goes back.
pub fn settle(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if name.starts_with(FRESH) {
            fs::remove_dir_all(&path)?;
        } else if let Some(name) = name.strip_prefix(OLD) {
            let place = folder.join(name);
            if place.exists() {
                fs::remove_dir_all(&path)?;
            } else {
                fs::rename(&path, &place)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(text: &'static str) -> impl Fn(&Path) -> Result<()> {
        move |folder| Ok(fs::write(folder.join("file"), text)?)
    }

    #[test]
    fn a_kill_between_two_renames_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path(), dir.path().join("best/file"));
        put_folder(folder, "best", &fill("one")).unwrap();
        put_folder(folder, "best", &fill("two")).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1);

        // Killed after the old one made room.
        fs::create_dir(folder.join(".writing-best")).unwrap();
        fs::rename(folder.join("best"), folder.join(".old-best")).unwrap();
        settle(folder).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");

        // Killed after the new one had the place.
        fs::create_dir(folder.join(".old-best")).unwrap();
        settle(folder).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
    }
}
