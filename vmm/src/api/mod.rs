//! The API: JSON over HTTP/1.1 on a unix socket that only its owner can open.
//!
//! | request | answer |
//! |---|---|
//! | `GET /api/v1/vmm.ping` | [`Ping`](types::vm::Ping) |
//! | `GET /api/v1/vm.info` | [`VmInfo`](types::vm::VmInfo) |
//! | `GET /api/v1/relay.status` | [`Status`](types::vm::Status) |
//! | `GET /api/v1/relay.events` | events, a line of JSON each: those that are kept; with `?follow=true` those that happen from then on, too |
//! | `GET /api/v1/vm.memory?gpa=0x1000&len=64` | guest RAM as bytes, 1 to `len` (at most 4 MiB): up to the first page that cannot be read, or the end of a block. 410 when the first byte is of a bad page, 409 when there is no memory behind it any more |
//! | `GET /api/v1/vm.extents` | an [`Extent`](types::vm::Extent) for each stretch of guest RAM that may hold something; with `?in_use=true` for each that has memory |
//! | `PUT /api/v1/vm.retire` | body [`Retire`](types::pages::Retire); a [`Retiring`](types::pages::Retiring) for each page |
//! | `PUT /api/v1/vm.poison` | body [`Poison`](types::pages::Poison); a [`Poisoning`](types::pages::Poisoning) for each page |
//! | `PUT /api/v1/vm.inject` | body [`Request`](crate::api::types::manual_mce::Request); what came of it on each vCPU. 409 when it would kill the guest and `force` is not set |
//! | `PUT /api/v1/vm.pause` | 204 when no vCPU is in the guest any more; also if that is so already |
//! | `PUT /api/v1/vm.resume` | 204; the vCPUs go on, unless pages are being marked as bad: then in a moment |
//! | `PUT /api/v1/vm.power-button` | 204; the guest is asked to power off. 409 when it is paused or does not listen |
//! | `PUT /api/v1/vm.reset` | 204; the guest starts over, paused or not |
//! | `PUT /api/v1/vm.shutdown` | 204; the VM ends, paused or not |
//! | `GET /api/v1/openapi.json` | all of this, as an OpenAPI document |
//! | `GET /metrics` | counts and times in Prometheus' text format |
//!
//! A VM that was paused because a vCPU touched a bad page and cannot be told (`--on-undeliverable
//! pause`) can be resumed like any other. The vCPU touches the page again, and if the guest still
//! cannot be told, the VM is paused again.
//!
//! Errors are `{"error": "…"}` with a status of 4xx or 5xx. The API runs on threads of its own and holds up no vCPU: it
//! shares only the ledger with them, and locks it only while it copies a part. A client that is slow, or sends without
//! end, holds up no other one: `server` has the limits.

pub mod current;
pub mod metrics;
pub mod routes;
pub mod server;
pub mod status;
pub mod stream;
pub mod types;
