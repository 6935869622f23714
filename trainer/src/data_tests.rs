//! Each filter, the safety of the walk, and the held-out split.

use super::*;

fn write(root: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn dropped(report: &Report, reason: Reason) -> usize {
    report.dropped.iter().find(|d| d.reason == reason).unwrap().files
}

#[test]
fn the_table_of_reasons_is_in_order() {
    assert!(REASONS.iter().enumerate().all(|(i, (reason, _))| *reason as usize == i));
}

#[test]
fn each_filter_drops_its_file_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(root, "b/keep.py", "x = 1\n");
    write(root, "b/same.py", "\nx  =\t1");
    write(root, "a-b.py", "y = 2\n");
    write(root, "a/keep.py", "é = 3\n");
    write(root, "latin1.py", [b'#', 0xe9]);
    write(root, "empty.py", " \n\t");
    write(root, "long.py", format!("a\n{}\n", "é".repeat(1001)) + &"b\n".repeat(99));
    write(root, "wide.py", "0123456789".repeat(11));
    write(root, "big.py", "# a line\n".repeat(50_000));
    write(root, "notes.txt", "text");
    write(root, "py", "no extension");
    write(root, "a/site-packages/z.py", "z = 1\n");
    let corpus = Corpus::read(root, &Filter::new(&["py"])).unwrap();
    let paths: Vec<&str> = corpus.documents.iter().map(|d| d.path.as_str()).collect();
    assert_eq!(paths, ["a-b.py", "a/keep.py", "b/keep.py"]);
    assert_eq!(corpus.documents[2].text, "x = 1\n", "the earlier duplicate stays");
    for (reason, _) in REASONS {
        let expected = match reason {
            Reason::Symlink => 0,
            Reason::Extension => 2,
            _ => 1,
        };
        assert_eq!(dropped(&corpus.report, reason), expected, "{reason:?}");
    }
    assert!(corpus.report.to_string().contains("duplicate"));
    let json = serde_json::to_string(&corpus.report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), corpus.report);
}

#[cfg(unix)]
#[test]
fn links_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    write(&root, "a.py", "x = 1\n");
    write(folder.path(), "outside.py", "secret = 1\n");
    std::os::unix::fs::symlink(&root, root.join("cycle")).unwrap();
    std::os::unix::fs::symlink("../outside.py", root.join("out.py")).unwrap();
    let corpus = Corpus::read(&root, &Filter::new(&["py"])).unwrap();
    assert_eq!(corpus.documents.len(), 1);
    assert_eq!(dropped(&corpus.report, Reason::Symlink), 2);
}

#[test]
fn errors_name_the_folder_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let read = |path: &Path| Corpus::read(path, &Filter::new(&["py"])).unwrap_err();
    assert!(format!("{:#}", read(folder.path())).contains("check the folder"));
    assert!(format!("{:#}", read(Path::new("/no/such"))).contains("/no/such"));
}

fn corpus(paths: impl Iterator<Item = String>, size: usize) -> Corpus {
    let documents: Vec<Document> =
        paths.map(|path| Document { path, text: "x".repeat(size) }).collect();
    let mut report = Report::empty();
    report.files = documents.len();
    report.bytes = (documents.len() * size) as u64;
    Corpus { documents, report }
}

#[test]
fn packages_are_held_out_whole() {
    let corpus = corpus((0..1000).map(|i| format!("p{}/f{}.py", i / 5, i % 5)), 10);
    let split = corpus.split(0.02, 1);
    assert_eq!(split.held_out.len(), 20, "2 % of the bytes");
    assert_eq!(split.train.len(), 980);
    let held: HashSet<&str> = split.held_out.iter().map(|d| d.package()).collect();
    assert_eq!(held.len(), 4);
    assert!(split.train.iter().all(|d| !held.contains(d.package())));
    assert_eq!(corpus.split(0.02, 1).held_out, split.held_out);
    assert_ne!(corpus.split(0.02, 2).held_out, split.held_out, "the seed matters");
}

#[test]
fn few_packages_are_split_by_file() {
    let corpus = corpus((0..200).map(|i| format!("p{}/f{i}.py", i % 3)), 10);
    let split = corpus.split(0.01, 1);
    assert_eq!((split.held_out.len(), split.train.len()), (2, 198));
    assert!(corpus.split(0.0, 1).held_out.is_empty());
}
