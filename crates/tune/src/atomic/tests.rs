use super::{
    faults::{Fault, at_every_moment, with_fault},
    *,
};
use std::fs;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_crash_while_a_file_is_written_leaves_the_old_or_the_new() {
    for existed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompt.npy");
        let (mut saw_old, mut saw_new) = (0, 0);
        let prepare = || {
            clean(dir.path()).unwrap();
            let _ = fs::remove_file(&path);
            if existed {
                fs::write(&path, b"old").unwrap();
            }
        };
        let work = || write_file(&path, b"something new");
        let moments = at_every_moment(Fault::Crash, prepare, work, |result, trace| {
            match fs::read(&path).ok().as_deref() {
                Some(b"something new") => saw_new += 1,
                Some(b"old") if existed && result.is_err() => saw_old += 1,
                None if !existed && result.is_err() => saw_old += 1,
                other => panic!("after {trace:?}: {result:?} and {other:?}"),
            }
        });
        assert_eq!((moments, saw_old, saw_new), (4, 3, 2));
    }
}

#[test]
fn a_file_is_flushed_before_and_its_directory_after_the_rename() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let (result, trace) = with_fault(Fault::Error, usize::MAX, || write_file(&path, b"1"));
    result.unwrap();
    let staged = temporary(&path).file_name().unwrap().display().to_string();
    let parent = dir.path().file_name().unwrap().display().to_string();
    assert_eq!(
        trace,
        [
            format!("write {staged}"),
            format!("sync {staged}"),
            "rename a".to_owned(),
            format!("sync_dir {parent}")
        ]
    );
}

/// A link to the device stands for the device: the machine's own would be lost if this failed.
#[cfg(unix)]
#[test]
fn what_is_no_file_is_written_to_and_links_stay_links() {
    let dir = tempfile::tempdir().unwrap();
    let (file, to_file, to_device) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    fs::write(&file, b"old").unwrap();
    std::os::unix::fs::symlink("a", &to_file).unwrap();
    std::os::unix::fs::symlink("/dev/null", &to_device).unwrap();
    write_file(&to_file, b"new").unwrap();
    write_file(&to_device, b"lost").unwrap();
    assert!(to_file.is_symlink() && to_device.is_symlink());
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["a", "b", "c"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_device_that_is_full_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("full");
    std::os::unix::fs::symlink("/dev/full", &link).unwrap();
    let message = write_file(&link, b"much").unwrap_err().to_string();
    assert!(message.contains("free some space") && link.is_symlink(), "{message}");
}

#[test]
fn a_failed_write_leaves_no_temporary_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let moments = at_every_moment(
        Fault::Error,
        || (),
        || write_file(&path, b"1"),
        |_, trace| assert!(names(dir.path()).iter().all(|name| name == "a"), "after {trace:?}"),
    );
    assert_eq!(moments, 4);
    let place = dir.path().join("d");
    at_every_moment(
        Fault::Error,
        || remove(&temporary(&place)).unwrap(),
        || write_dir(&place, |staged| write_synced(&staged.join("x"), b"1")),
        |result, trace| {
            // Only where removing itself fails can something stay, and then the error says so.
            let left = names(dir.path()).iter().any(|name| name.starts_with(TEMPORARY));
            assert!(
                !left || trace.last().unwrap().starts_with("remove") && result.is_err(),
                "after {trace:?}"
            );
        },
    );
}

#[test]
fn a_crash_while_a_directory_is_replaced_leaves_the_old_or_the_new_whole() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("adapter");
    let fill = |text: &'static str| {
        move |staged: &Path| {
            write_synced(&staged.join("one"), text.as_bytes())?;
            write_synced(&staged.join("two"), text.as_bytes())
        }
    };
    let (mut saw_old, mut saw_new) = (0, 0);
    for at in 0.. {
        clean(dir.path()).unwrap();
        write_dir(&place, fill("old")).unwrap();
        let (result, trace) = with_fault(Fault::Crash, at, || write_dir(&place, fill("new")));
        let texts = ["one", "two"].map(|name| fs::read_to_string(place.join(name)).unwrap());
        match [&*texts[0], &*texts[1]] {
            ["old", "old"] if result.is_err() => saw_old += 1,
            ["new", "new"] => saw_new += 1,
            other => panic!("after {trace:?}: {result:?} and {other:?}"),
        }
        if result.is_ok() {
            assert_eq!(names(dir.path()), ["adapter"]);
            break;
        }
    }
    assert!(saw_old >= 6 && saw_new >= 2, "{saw_old} old, {saw_new} new");
}

#[test]
fn a_file_system_that_cannot_exchange_has_the_old_or_the_new_somewhere() {
    for at in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let [staged, place, old] = [".tmp-x", "x", "x.old"].map(|name| dir.path().join(name));
        for (path, text) in [(&staged, "new"), (&place, "old"), (&old, "older")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("a"), text).unwrap();
        }
        let (result, trace) = with_fault(Fault::Crash, at + 2, || exchange_in_steps(&staged, &place));
        let holds = |path: &Path| fs::read_to_string(path.join("a")).ok();
        let found = holds(&place).or_else(|| holds(&old)).unwrap();
        assert!(found == "old" && at < 2 || found == "new", "after {trace:?}: {found}");
        assert_eq!(result.is_ok(), at == 3);
        assert_eq!(holds(&staged).as_deref() == Some("old"), at == 3);
    }
}

#[test]
fn a_link_points_to_the_old_or_the_new_at_every_moment() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("best");
    for fault in [Fault::Crash, Fault::Error] {
        let prepare = || {
            clean(dir.path()).unwrap();
            relink(&link, Path::new("checkpoints/a")).unwrap();
        };
        let mut seen = Vec::new();
        at_every_moment(
            fault,
            prepare,
            || relink(&link, Path::new("checkpoints/b")),
            |_, _| {
                seen.push(fs::read_link(&link).unwrap());
            },
        );
        let [a, b] = ["checkpoints/a", "checkpoints/b"].map(PathBuf::from);
        assert_eq!(seen, [a.clone(), a, b.clone(), b]);
    }
}

#[test]
fn a_directory_is_removed_whole_and_what_a_crash_left_is_cleaned() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("step-1");
    for at in 0.. {
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("x"), "1").unwrap();
        fs::write(place.join("y"), "2").unwrap();
        let (result, trace) = with_fault(Fault::Crash, at, || remove_dir(&place));
        assert!(!place.exists() || names(&place) == ["x", "y"], "half removed after {trace:?}");
        clean(dir.path()).unwrap();
        assert!(names(dir.path()).iter().all(|name| name == "step-1"));
        if result.is_ok() {
            assert!(at >= 4 && !place.exists());
            return;
        }
    }
}

#[test]
fn cleaning_removes_temporary_names_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(".tmp-a-1"), "").unwrap();
    fs::create_dir_all(dir.path().join(".tmp-b-2/c")).unwrap();
    fs::write(dir.path().join("keep"), "").unwrap();
    fs::write(dir.path().join(".hidden"), "").unwrap();
    assert_eq!(clean(dir.path()).unwrap(), [dir.path().join(".tmp-a-1"), dir.path().join(".tmp-b-2")]);
    assert_eq!(names(dir.path()), [".hidden", "keep"]);
    assert!(clean(&dir.path().join("absent")).unwrap().is_empty());
}

#[test]
fn a_path_below_a_file_is_refused_with_a_mend() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for error in [create_dir(&file.join("out")), write_file(&file.join("a"), b"1")] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("file/") && error.contains("choose another directory"), "{error}");
    }
}
