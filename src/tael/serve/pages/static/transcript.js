// The messages of a conversation. The server renders them (and escapes what strangers wrote); this component owns the
// DOM beneath it, so that a piece of an answer changes one block and nothing else is looked at again.
export default {
  template: `
    <div class="transcript">
      <div class="scroller" ref="scroller" @scroll.passive="scrolled" @click="clicked" @keydown="typed">
        <div class="messages" ref="messages" role="log" aria-live="off" :aria-label="label"></div>
      </div>
      <button v-show="!following" type="button" class="latest" aria-label="Go to the latest message" @click="toEnd">↓ Latest</button>
      <div class="unseen" role="status" aria-live="polite" ref="spoken"></div>
    </div>`,
  props: { items: Array, label: String },
  data: () => ({ following: true }),
  mounted() {
    this.splice(0, this.items || []);
  },
  methods: {
    // Keep the first `keep` messages, put these in place of the others.
    splice(keep, items) {
      const messages = this.$refs.messages;
      while (messages.children.length > keep) messages.lastElementChild.remove();
      for (const html of items) messages.insertAdjacentHTML("beforeend", html);
      this.toEnd();
    },
    replace(node, html) {
      const article = this.article(node);
      if (article) article.outerHTML = html;
      this.follow();
    },
    // ops: {html: {part: html}, blocks: {part: [first, [html, ..]]}, open: {part: true or false}, show: [part], done}
    patch(node, ops) {
      const article = this.article(node);
      if (!article) return;
      for (const [part, html] of Object.entries(ops.html || {})) this.part(article, part).innerHTML = html;
      for (const [part, [first, blocks]] of Object.entries(ops.blocks || {})) {
        const parent = this.part(article, part);
        blocks.forEach((html, i) => {
          const block = parent.children[first + i] || parent.appendChild(Object.assign(document.createElement("div"), { className: "block" }));
          if (block.source !== html) block.innerHTML = block.source = html;
        });
        while (parent.children.length > first + blocks.length) parent.lastElementChild.remove();
      }
      for (const [part, open] of Object.entries(ops.open || {})) this.part(article, part).open = open;
      for (const part of ops.show || []) this.part(article, part).hidden = false;
      if (ops.done) article.setAttribute("aria-busy", "false");
      this.follow();
    },
    say(text) {
      this.$refs.spoken.textContent = text;
    },
    copy(text) {
      window.tael.copy(text);
    },
    focus(node, selector) {
      const target = this.article(node)?.querySelector(selector);
      if (!target) return;
      target.focus();
      if (target.setSelectionRange) target.setSelectionRange(target.value.length, target.value.length);
      window.tael.grow(target);
    },
    article(node) {
      return this.$refs.messages.querySelector(`:scope > [data-node="${Number(node)}"]`);
    },
    part(article, name) {
      return article.querySelector(`[data-part="${name}"]`) || document.createElement("div");
    },
    scrolled() {
      const box = this.$refs.scroller;
      this.following = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    },
    follow() {
      if (this.following) this.$refs.scroller.scrollTop = this.$refs.scroller.scrollHeight;
    },
    toEnd() {
      this.following = true;
      this.follow();
    },
    clicked(event) {
      const button = event.target.closest("[data-act]");
      if (!button) return;
      const article = button.closest("[data-node]");
      const field = button.closest("[data-form]")?.querySelector("textarea");
      const act = { act: button.dataset.act, node: Number(article?.dataset.node || 0) };
      if (button.dataset.arg) act.arg = button.dataset.arg;
      if (field) act.text = field.value;
      this.$emit("act", act);
    },
    typed(event) {
      const form = event.target.closest("[data-form]");
      if (!form || event.isComposing) return;
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.querySelector("[data-main]")?.click();
      if (event.key === "Escape") {
        form.querySelector("[data-cancel]")?.click();
        event.stopPropagation();
      }
    },
  },
};
