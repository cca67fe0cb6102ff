"use strict";
// Keeps a page up to date while it is looked at. Without this, a page shows what was when it was loaded.
(() => {
  const live = document.getElementById("live");
  const spoken = document.getElementById("spoken");
  const connection = document.getElementById("connection");
  const suffix = " · spvtpm";
  const againMs = 5000;
  let source = null;
  let waiting = 0;
  let isOver = "over" in live.dataset;

  // Changes what differs and nothing else, so that focus, selection and scrolling stay where they are.
  function renew(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== Node.ELEMENT_NODE || old.nodeName !== fresh.nodeName
        || old.childNodes.length !== fresh.childNodes.length) {
      old.replaceWith(fresh);
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const children = [...fresh.childNodes];
    [...old.childNodes].forEach((child, index) => renew(child, children[index]));
  }

  function show(told) {
    const focused = live.contains(document.activeElement) ? document.activeElement : null;
    const href = focused && focused.getAttribute("href");
    const fresh = new DOMParser().parseFromString(told.html, "text/html").body;
    const children = [...fresh.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE);
    if (children.length === live.children.length) {
      [...live.children].forEach((child, index) => renew(child, children[index]));
    } else {
      live.replaceChildren(...children);
    }
    if (focused && !focused.isConnected && href) {
      const again = [...live.querySelectorAll("a")].find((link) => link.getAttribute("href") === href);
      if (again) again.focus();
    }
    document.title = told.title + suffix;
    if (spoken.textContent !== told.announcement) spoken.textContent = told.announcement;
  }

  function say(words, kind) {
    connection.hidden = false;
    connection.textContent = words;
    connection.dataset.kind = kind;
  }

  function close() {
    clearTimeout(waiting);
    if (source) source.close();
    source = null;
  }

  function open() {
    if (isOver || source || document.hidden) return;
    source = new EventSource(location.href);
    source.addEventListener("open", () => say("live", "good"));
    source.addEventListener("page", (event) => show(JSON.parse(event.data)));
    source.addEventListener("end", () => { isOver = true; close(); connection.hidden = true; });
    source.addEventListener("reload", () => { close(); location.reload(); });
    source.addEventListener("error", () => {
      say("connecting again", "bad");
      if (source.readyState !== EventSource.CLOSED) return;  // the browser tries again by itself
      close();
      waiting = setTimeout(open, againMs * (1 + Math.random()));  // refused for now: its database is away, say
    });
  }

  // A browser has few connections to one origin: a page that nobody looks at needs none.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
})();
