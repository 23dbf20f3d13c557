// What every page does in the browser alone: theme, drawer, shortcuts, copying. Loaded in the head, before anything shows.
(() => {
  const root = document.documentElement;
  const cookie = (name) => document.cookie.split("; ").find((part) => part.startsWith(name + "="))?.split("=")[1];
  const keep = (name, value) => (document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=lax`);
  const narrow = () => matchMedia("(max-width: 800px)").matches;

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    keep("tael-theme", theme);
    if (window.setDark) window.setDark(theme === "auto" ? null : theme === "dark");
    document.querySelectorAll("[data-theme-label]").forEach((each) => (each.textContent = theme));
  };
  root.dataset.theme = ["dark", "light"].includes(cookie("tael-theme")) ? cookie("tael-theme") : "auto";
  root.dataset.sidebar = narrow() || cookie("tael-sidebar") === "closed" ? "closed" : "open";

  const setSidebar = (state) => {
    root.dataset.sidebar = state;
    if (!narrow()) keep("tael-sidebar", state);
    document.querySelectorAll('[data-do="sidebar"]').forEach((each) => each.setAttribute("aria-expanded", state === "open"));
  };

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without HTTPS, browsers give the clipboard only to this old way.
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };

  const grow = (area) => {
    area.style.height = "auto";
    area.style.height = Math.min(area.scrollHeight + 2, innerHeight * 0.45) + "px";
  };

  const press = (name) => {
    const target = [...document.querySelectorAll(`[data-shortcut="${name}"]`)].find((each) => each.offsetParent !== null || name === "search");
    if (!target) return false;
    target.click();
    target.focus();
    return true;
  };

  const actions = {
    theme: () => setTheme({ auto: "dark", dark: "light", light: "auto" }[root.dataset.theme]),
    sidebar: () => setSidebar(root.dataset.sidebar === "open" ? "closed" : "open"),
    "close-sidebar": () => setSidebar("closed"),
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) actions[button.dataset.do]?.();
    const copier = event.target.closest("[data-copy]");
    if (copier) {
      copy(copier.closest(".code").querySelector("code").textContent);
      copier.textContent = "Copied";
      setTimeout(() => (copier.textContent = "Copy"), 1500);
    }
    if (event.target.closest("[data-closes]") && narrow()) setSidebar("closed");
  });

  document.addEventListener("keydown", (event) => {
    const mod = event.ctrlKey || event.metaKey;
    const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
    const dialog = document.querySelector(".q-dialog, .q-menu");
    let done = false;
    if (mod && !event.shiftKey && event.key.toLowerCase() === "k") {
      if (document.querySelector('[data-shortcut="search"]')) setSidebar("open");
      done = press("search");
    } else if (mod && event.shiftKey && event.key.toLowerCase() === "o") done = press("new");
    else if (event.key === "Escape" && !dialog) {
      if (narrow() && root.dataset.sidebar === "open") done = setSidebar("closed") ?? true;
      else done = press("stop");
    } else if (event.key === "?" && !typing && !mod) done = press("shortcuts");
    if (done) event.preventDefault();
  });

  // Going back in the browser shows the conversation that was shown then.
  addEventListener("popstate", () => location.reload());

  window.tael = { copy, grow, setSidebar, setTheme };
})();
