//! The directory of a file or a socket that is to be made: "No such file" alone says nothing of what is missing.

use std::io;
use std::path::Path;

/// The directory that `path` is in.
#[must_use]
pub fn of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `error`, as which making `path` failed; where its directory is missing, with the name of that.
#[must_use]
pub fn named(path: &Path, error: io::Error) -> io::Error {
    let dir = of(path);
    let kind = error.kind();
    let shown = dir.display();
    let words = match kind {
        io::ErrorKind::NotFound if !dir.exists() => {
            format!(
                "the directory {shown} is not there; make it (mkdir -p), or choose another path"
            )
        }
        io::ErrorKind::NotADirectory => format!("{shown} is no directory; choose another path"),
        _ => return error,
    };
    io::Error::new(kind, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_named_where_it_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let words = |path: &Path| {
            let error = std::fs::File::create_new(path).unwrap_err();
            (error.to_string(), named(path, error).to_string())
        };
        let (_, said) = words(&dir.path().join("no/such/x"));
        let missing = format!("the directory {}/no/such is not there", dir.path().display());
        assert!(said.contains(&missing) && said.contains("mkdir -p"), "{said}");
        let (_, said) = words(&file.join("x"));
        assert!(said.contains(&format!("{} is no directory", file.display())), "{said}");
        let (before, said) = words(&file);
        assert_eq!(said, before, "its directory is there");
        assert_eq!((of(Path::new("x")), of(Path::new("/x"))), (Path::new("."), Path::new("/")));
    }
}
