//! Makes one dump: into a file or a stream, in either form.

use std::io::{self, IsTerminal};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::commands::dump::account::{Dumped, list_of};
use crate::commands::dump::elf::{self, Layout};
use crate::commands::dump::error::DumpError;
use crate::commands::dump::file::{Stream, Unfinished};
use crate::commands::dump::form::{Form, Target};
use crate::commands::dump::ram::{len_of, subtract};
use crate::commands::dump::sweep::{Found, Job, Steps};

/// Checks that a dump may go to stdout.
///
/// # Errors
/// [`DumpError::TerminalDump`].
pub fn check_stdout() -> Result<(), DumpError> {
    if io::stdout().is_terminal() { Err(DumpError::TerminalDump) } else { Ok(()) }
}

/// Writes the memory of the VM behind `socket` in `form` to `target`. `progress` is called with the number of bytes
/// done and in all.
///
/// A raw file gets its account beside it, at its path with `.json` added, which must not exist either; and it ends at
/// the highest RAM.
///
/// In a file, everything that is no RAM, reads as zeros, is bad or cannot be read is a hole. In a stream it is zeros;
/// and as an ELF core begins with the list of bad pages, all memory is read once before.
///
/// # Errors
/// See [`DumpError`]; a file is removed then.
pub fn dump(
    socket: &Path,
    form: Form,
    target: Target<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    match target {
        Target::File(path) => {
            to_file(socket, form, path, progress).map_err(|error| error.with_removed(path))
        }
        Target::Stream(out) => {
            let job = Job::start(socket)?;
            let mut stream = Stream::new(out, &job.interrupt);
            let done = match form {
                Form::Elf => core_to_stream(&job, &mut stream, progress),
                Form::Raw => raw_to_stream(&job, &mut stream, progress),
            };
            done.map_err(|error| match stream.at {
                0 => error,
                bytes => DumpError::HalfAStream { bytes, source: Box::new(error) },
            })
        }
    }
}

fn to_file(
    socket: &Path,
    form: Form,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    let list = (form == Form::Raw).then(|| list_of(path));
    for path in [Some(path), list.as_deref()].into_iter().flatten() {
        if path.symlink_metadata().is_ok() {
            return Err(DumpError::Exists(path.to_owned()));
        }
    }
    let job = Job::start(socket)?;
    let mut unfinished = Unfinished::default();
    let file = unfinished.create(path)?;
    let write_error = |source| DumpError::Write { path: path.to_owned(), source };
    let (layout, most) = Layout::roomy(&job.ram, job.vm.info.vcpus);
    let offset = |gpa| match form {
        Form::Elf => layout.offset(&job.ram, gpa),
        Form::Raw => gpa,
    };
    let end = if form == Form::Elf { layout.late } else { job.ram.end() };
    file.set_len(end).map_err(write_error)?;

    let (mut found, mut steps) = (Found::default(), Steps::new(len_of(&job.extents), progress));
    job.sweep(&job.extents, &mut found, &mut steps, &mut |gpa, part| {
        file.write_all_at(part, offset(gpa)).map_err(write_error)
    })?;
    let registers = if form == Form::Elf { job.vm.registers()? } else { Vec::new() };
    let mut dumped = job.account(form, found, &registers)?;
    if form == Form::Elf {
        let late = dumped.make_late(most);
        let late = elf::pages(&late, 0);
        file.write_all_at(&late, end).and_then(|()| file.sync_all()).map_err(write_error)?;
        // Last: without a header the file is no core.
        let headers = core_headers(&job, layout, &dumped, &registers, late.len());
        file.write_all_at(&headers, 0).map_err(write_error)?;
    }
    file.sync_all().map_err(write_error)?;

    dumped.file = path.file_name().map(|name| name.to_string_lossy().into_owned());
    dumped.path = Some(path.to_owned());
    if let Some(list) = list {
        // Plain structs of strings and numbers: their serialisation cannot fail.
        let mut text = serde_json::to_vec_pretty(&dumped).unwrap_or_default();
        text.push(b'\n');
        let account = unfinished.create(&list)?;
        account
            .write_all_at(&text, 0)
            .and_then(|()| account.sync_all())
            .map_err(|source| DumpError::Write { path: list, source })?;
    }
    unfinished.keep();
    Ok(dumped)
}

fn raw_to_stream(
    job: &Job<'_>,
    stream: &mut Stream<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    let (mut found, mut steps) = (Found::default(), Steps::new(len_of(&job.extents), progress));
    job.sweep(&job.extents, &mut found, &mut steps, &mut |gpa, part| stream.put(gpa, part))?;
    let dumped = job.account(Form::Raw, found, &[])?;
    stream.end_at(job.ram.end())?;
    Ok(dumped)
}

/// All memory is read twice, as bad pages are listed before any of it is written.
fn core_to_stream(
    job: &Job<'_>,
    stream: &mut Stream<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    let all = len_of(&job.extents);
    let (mut found, mut steps) = (Found::default(), Steps::new(2 * all, progress));
    job.sweep(&job.extents, &mut found, &mut steps, &mut |_, _| Ok(()))?;
    let registers = job.vm.registers()?;
    let first = job.account(Form::Elf, found, &registers)?;
    let lost = first.lost();
    let notes = elf::machine(first.kernel.as_ref(), &registers).len() + elf::pages(&lost, 0).len();
    let layout = Layout::exact(&job.ram, elf::loads(&job.ram, &lost).len(), notes);
    let late_len = elf::pages(&[], elf::MOST_LATE).len();
    let headers = core_headers(job, layout, &first, &registers, late_len);
    stream.put(0, &headers)?;

    let whole = subtract(&job.extents, lost.iter().map(|lost| lost.extent));
    let mut found = Found::default();
    job.sweep(&whole, &mut found, &mut steps, &mut |gpa, part| {
        stream.put(layout.offset(&job.ram, gpa), part)
    })?;
    let second = job.account(Form::Elf, found, &registers)?;
    let mut dumped = Dumped { bytes: second.bytes, paused: first.paused && second.paused, ..first };
    let late = dumped.add_late(&second);
    if late.len() > elf::MOST_LATE {
        return Err(DumpError::TooManyLate { most: elf::MOST_LATE });
    }
    stream.put(layout.late, &elf::pages(&late, elf::MOST_LATE)).and_then(|()| stream.end_at(0))?;
    Ok(dumped)
}

/// The beginning of an ELF core, up to the memory.
fn core_headers(
    job: &Job<'_>,
    layout: Layout,
    dumped: &Dumped,
    registers: &[mce_relay_vmm::api::types::registers::Registers],
    late: usize,
) -> Vec<u8> {
    let lost = dumped.lost();
    let mut notes = elf::machine(dumped.kernel.as_ref(), registers);
    notes.extend(elf::pages(&lost, 0));
    elf::headers(layout, &job.ram, &elf::loads(&job.ram, &lost), &notes, late)
}
