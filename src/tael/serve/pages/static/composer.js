// Where a question is written: text, files dropped anywhere on the page, Enter sends, Shift+Enter makes a new line.
const MAX_FILE = 200000;
const MAX_ALL = 400000;

export default {
  template: `
    <form class="composer" :class="{over: over}" @submit.prevent="submit">
      <ul v-if="files.length" class="files" aria-label="Files of this question">
        <li v-for="(file, i) in files" :key="i">{{ file.name }} <span class="faint">{{ Math.ceil(file.size / 1000) }} kB</span>
          <button type="button" class="quiet" :aria-label="'Remove ' + file.name" @click="files.splice(i, 1)">×</button></li>
      </ul>
      <p v-if="problem" class="problem" role="alert">{{ problem }}</p>
      <textarea ref="text" v-model="text" rows="1" :placeholder="placeholder" aria-label="Message" id="message"
        @input="keep" @keydown="typed" @paste="pasted"></textarea>
      <div class="composer-bar">
        <input ref="picker" type="file" multiple class="unseen" tabindex="-1" aria-hidden="true" @change="picked">
        <button type="button" class="icon" aria-label="Add text files" title="Add text files (or drop them anywhere)" @click="$refs.picker.click()">
          <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M21 11.5 12.2 20.300a5.5 5.5 0 0 1-7.8-7.800L13.3 3.600a3.7 3.7 0 0 1 5.2 5.200l-8.9 8.900a1.8 1.8 0 0 1-2.6-2.600l8.2-8.2"/></svg>
        </button>
        <slot></slot>
        <button v-if="busy" type="button" class="send" data-shortcut="stop" aria-label="Stop" title="Stop (Esc)" @click="$emit('stop')">
          <svg viewBox="0 0 24 24" aria-hidden="true"><rect x="7" y="7" width="10" height="10" rx="1.5" fill="currentColor"/></svg>
        </button>
        <button v-else type="submit" class="send" aria-label="Send" title="Send (Enter)" :disabled="!text.trim() && !files.length">
          <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 19V5M5.5 11.5 12 5l6.5 6.5"/></svg>
        </button>
      </div>
    </form>`,
  props: { busy: Boolean, placeholder: String },
  data: () => ({ text: "", files: [], problem: "", over: false, depth: 0 }),
  mounted() {
    this.dragged = (event) => {
      if (![...(event.dataTransfer?.types || [])].includes("Files")) return;
      event.preventDefault();
      if (event.type === "dragenter") this.depth += 1;
      if (event.type === "dragleave") this.depth -= 1;
      if (event.type === "drop") {
        this.depth = 0;
        this.add(event.dataTransfer.files);
      }
      this.over = this.depth > 0;
    };
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) document.addEventListener(name, this.dragged);
    this.text = sessionStorage.getItem("tael-draft") || "";
    this.$nextTick(this.grow);
    if (matchMedia("(pointer: fine)").matches) this.focus();
  },
  unmounted() {
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) document.removeEventListener(name, this.dragged);
  },
  methods: {
    clear() {
      this.text = "";
      this.files = [];
      this.problem = "";
      sessionStorage.removeItem("tael-draft");
      this.$nextTick(this.grow);
    },
    fail(problem) {
      this.problem = problem;
    },
    focus() {
      this.$refs.text.focus();
    },
    // What is written outlives a reload of this tab.
    keep() {
      sessionStorage.setItem("tael-draft", this.text);
      this.grow();
    },
    grow() {
      window.tael.grow(this.$refs.text);
    },
    typed(event) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    },
    submit() {
      if (this.busy || (!this.text.trim() && !this.files.length)) return;
      this.problem = "";
      const files = this.files.map(({ name, text }) => ({ name, text }));
      const size = files.reduce((sum, file) => sum + file.text.length, this.text.length);
      if (size > MAX_ALL) this.problem = `That is ${size.toLocaleString()} characters, more than ${MAX_ALL.toLocaleString()}; leave something out.`;
      else this.$emit("send", { text: this.text, files });
    },
    picked(event) {
      this.add(event.target.files);
      event.target.value = "";
    },
    pasted(event) {
      if (event.clipboardData?.files.length) {
        event.preventDefault();
        this.add(event.clipboardData.files);
      }
    },
    async add(list) {
      this.problem = "";
      for (const file of [...list]) {
        if (file.size > MAX_FILE) {
          this.problem = `${file.name}: larger than ${MAX_FILE / 1000} kB; give the part that matters.`;
          continue;
        }
        try {
          const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
          if (text.includes("\0")) throw new TypeError();
          this.files.push({ name: file.name, size: file.size, text });
        } catch {
          this.problem = `${file.name}: not a text file (UTF-8); only text can be put into the prompt.`;
        }
      }
      this.focus();
    },
  },
};
