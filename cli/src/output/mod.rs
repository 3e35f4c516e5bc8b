//! Output for people and programs: tables, progress and JSON, and what the terminal can show.

pub mod print;
pub mod progress;
pub mod screen;
pub mod stretches;
pub mod table;
