// The page about the API: buttons that copy its examples.
for (const code of document.querySelectorAll("pre code")) {
  code.parentElement.previousElementSibling.append(button("copy", "Copy example", copy(() => code.textContent)));
}
