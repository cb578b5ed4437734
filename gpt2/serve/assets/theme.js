// Light or dark: the system's choice, until the person makes one.
const THEMES = ["system", "light", "dark"];

function theme() { const kept = local.getItem("gpt2-theme"); return THEMES.includes(kept) ? kept : "system"; }
function isDark() { return theme() === "dark" || (theme() === "system" && matchMedia("(prefers-color-scheme: dark)").matches); }
function showTheme() {
  if (theme() === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme();
  for (const name of THEMES) $("theme-" + name)?.setAttribute("aria-pressed", name === theme());
  $("theme").title = $("theme").ariaLabel = isDark() ? "Light colours" : "Dark colours";
}
function chooseTheme(name) {
  try { local.setItem("gpt2-theme", name); } catch { /* full: as before */ }
  showTheme();
}
$("theme").onclick = () => chooseTheme(isDark() ? "light" : "dark");
for (const name of THEMES) if ($("theme-" + name)) $("theme-" + name).onclick = () => chooseTheme(name);
matchMedia("(prefers-color-scheme: dark)").onchange = showTheme;
showTheme();
