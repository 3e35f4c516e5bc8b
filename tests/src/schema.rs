//! docs/openapi.json as a judge of what the VM says.

use std::sync::OnceLock;

use jsonschema::Validator;
use serde_json::{Value, json};

/// The document.
pub fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        serde_json::from_str(include_str!("../../docs/openapi.json")).expect("docs/openapi.json")
    })
}

/// Checks values against one of its schemas.
#[derive(Debug)]
pub struct Schema(Validator);

impl Schema {
    /// The component that is called so.
    pub fn of(name: &str) -> Self {
        let at = format!("#/components/schemas/{name}");
        Self::at(&json!({ "$ref": at }))
    }

    /// A schema of the document, with its references.
    pub fn at(schema: &Value) -> Self {
        let mut whole = schema.clone();
        whole["components"] = document()["components"].clone();
        whole["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
        Self(jsonschema::validator_for(&whole).expect("a schema whose references lead somewhere"))
    }

    /// Whether `value` is as the schema says.
    pub fn accepts(&self, value: &Value) -> bool {
        self.0.is_valid(value)
    }

    /// Fails with everything that is not as the schema says.
    pub fn check(&self, value: &Value) {
        let errors: Vec<String> = self
            .0
            .iter_errors(value)
            .map(|error| format!("{}: {error}", error.instance_path))
            .collect();
        assert!(errors.is_empty(), "{}\n{value:#}", errors.join("\n"));
    }
}
