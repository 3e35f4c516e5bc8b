//! docs/openapi.json as a judge of what the VM says.

use std::sync::OnceLock;

use jsonschema::Validator;
use serde_json::{Value, json};

/// The document, whose references all lead somewhere.
pub fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json"))
            .expect("docs/openapi.json");
        references(&document, &document);
        document
    })
}

/// Sees that every reference in `part` of `document` leads somewhere.
fn references(part: &Value, document: &Value) {
    match part {
        Value::Object(fields) => {
            if let Some(Value::String(to)) = fields.get("$ref") {
                let found = to.strip_prefix('#').and_then(|to| document.pointer(to));
                assert!(found.is_some(), "there is nothing at {to}");
            }
            fields.values().for_each(|part| references(part, document));
        }
        Value::Array(parts) => parts.iter().for_each(|part| references(part, document)),
        _ => {}
    }
}

/// What a part of the document stands for: itself, or what it refers to.
pub fn resolved(part: &Value) -> &Value {
    let to = part["$ref"].as_str().and_then(|to| to.strip_prefix('#'));
    to.and_then(|to| document().pointer(to)).unwrap_or(part)
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
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{}\n{value:#}", errors.join("\n"));
    }
}
