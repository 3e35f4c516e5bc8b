//! Runs a list of tests, one after the other; what cannot run here is skipped with its reason.

use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::stuck;

/// One test: its name, what it needs of this machine, and itself.
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// `Err` with the reason when it cannot run here.
    pub needs: fn() -> Result<(), String>,
    /// Panics when it fails.
    pub run: fn(),
}

/// Runs `tests` as the command line says (the options of Rust's own runner) and prints its summary.
pub fn run(tests: &'static [Test]) -> ExitCode {
    // What is started here is to have them as from a shell: nohup, or a shell without job control, has some ignored.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the default action is no function.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut arguments = Arguments::from_args();
    // Guests share two emulated processors, and a rendezvous has a time limit.
    arguments.test_threads = Some(1);
    stuck::report_panics();
    let trials = tests
        .iter()
        .map(|test| match (test.needs)() {
            Ok(()) => Trial::test(test.name, || {
                let start = Instant::now();
                let _watch = stuck::Watch::over(test.name);
                // A test prints its own failure; what it left behind is in its output.
                std::panic::catch_unwind(test.run).map_err(|_| Failed::from("see above"))?;
                println!("    {} took {:.1} s", test.name, start.elapsed().as_secs_f64());
                Ok(())
            }),
            Err(reason) => {
                let said = reason.clone();
                // Asked for all the same (--ignored), it says so instead of passing.
                let trial =
                    Trial::test(test.name, || Err(Failed::from(reason))).with_ignored_flag(true);
                if !arguments.list && !arguments.is_filtered_out(&trial) {
                    println!("SKIPPED {}: {said}", test.name);
                }
                trial
            }
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A list of tests, `module::function needs condition`, each a function of this program.
#[macro_export]
macro_rules! tests {
    ($($module:ident :: $test:ident needs $needs:expr),* $(,)?) => {
        &[$($crate::suite::Test {
            name: concat!(stringify!($module), "::", stringify!($test)),
            needs: $needs,
            run: $module::$test,
        }),*]
    };
}
