"use strict";
(() => {
  const rows = Array.from(document.querySelectorAll("#pages tbody tr"));
  const form = document.getElementById("filter");
  if (!form) return;
  const [text, kind, outcome, told] = ["text", "kind", "outcome", "told"].map((id) => document.getElementById("filter-" + id));
  // Read once: there may be thousands.
  const words = rows.map((row) => row.textContent.toLowerCase());
  const show = () => {
    const wanted = text.value.toLowerCase().split(" ").filter((word) => word !== "");
    let count = 0;
    rows.forEach((row, at) => {
      const fits = wanted.every((word) => words[at].includes(word)) &&
        (kind.value === "" || row.dataset.kinds.split(" ").includes(kind.value)) &&
        (outcome.value === "" || row.dataset.outcome === outcome.value);
      row.hidden = !fits;
      count += fits ? 1 : 0;
    });
    told.textContent = count === rows.length ? "All " + count + " rows are shown." : count + " of " + rows.length + " rows are shown.";
  };
  let soon = 0;
  const later = () => { clearTimeout(soon); soon = setTimeout(show, 150); };
  text.addEventListener("input", later);
  kind.addEventListener("change", show);
  outcome.addEventListener("change", show);
  document.getElementById("filter-all").addEventListener("click", () => {
    text.value = kind.value = outcome.value = "";
    show();
    text.focus();
  });
  // Browsers keep what was in the fields when a page is loaded again.
  show();
  form.hidden = false;
})();
