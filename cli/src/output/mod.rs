//! Results for people and programs: tables, progress and JSON, and what the terminal can show.

pub mod screen;
pub mod show;
pub mod table;
