// The picture on which boxes are drawn, with mouse, finger or keys. Boxes are [x1, y1, x2, y2] in pixels of the picture.

const SMALLEST = 6; // screen pixels; a click is no box
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Stage extends EventTarget {
  /** Fires `change` whenever boxes change, and `select` when another box is chosen (`selected`: its number or −1). */
  constructor(element) {
    super();
    this.element = element;
    this.image = element.querySelector('img');
    this.layer = element.querySelector('.boxes');
    this.boxes = [];
    this.selected = -1;
    element.addEventListener('pointerdown', (event) => this.begin(event));
    this.layer.addEventListener('keydown', (event) => this.key(event));
    this.layer.addEventListener('focusin', (event) => this.select(this.numberOf(event.target)));
  }

  show({ url, width, height, name, boxes }) {
    Object.assign(this, { width, height, boxes: boxes.map((box) => [...box]), selected: boxes.length - 1 });
    this.image.src = url;
    this.image.alt = name;
    this.element.style.aspectRatio = `${width} / ${height}`;
    this.element.style.setProperty('--ratio', width / height);
    this.render();
  }

  numberOf = (target) => [...this.layer.children].indexOf(target.closest('.box'));

  select(number) {
    if (number === this.selected) return;
    this.selected = number;
    this.mark();
    this.dispatchEvent(new Event('select'));
  }

  changed() {
    this.render();
    this.dispatchEvent(new Event('change'));
  }

  /** A box in the middle, for those who do not draw. */
  add() {
    const [width, height] = [this.width / 4, this.height / 4].map(Math.round);
    const [x, y] = [(this.width - width) / 2, (this.height - height) / 2].map(Math.round);
    this.put(this.boxes.length, [x, y, x + width, y + height]);
    this.layer.children[this.selected].focus();
  }

  put(number, box) {
    this.boxes[number] = box;
    this.selected = number;
    this.changed();
  }

  remove(number = this.selected) {
    if (number < 0) return;
    this.boxes.splice(number, 1);
    this.selected = Math.min(number, this.boxes.length - 1);
    this.changed();
  }

  replace(boxes) {
    this.boxes = boxes.map((box) => [...box]);
    this.selected = boxes.length - 1;
    this.changed();
  }

  /** Pointer → whole pixels of the picture. */
  place({ clientX, clientY }) {
    const area = this.layer.getBoundingClientRect();
    return [
      Math.round(Math.min(1, Math.max(0, (clientX - area.left) / area.width)) * this.width),
      Math.round(Math.min(1, Math.max(0, (clientY - area.top) / area.height)) * this.height),
    ];
  }

  begin(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    event.preventDefault();
    const number = this.numberOf(event.target), start = this.place(event), before = this.boxes.map((box) => [...box]);
    const shape = event.target.closest('.handle') ? resized : number >= 0 ? moved : drawn;
    const target = number >= 0 ? number : this.boxes.length;
    if (number >= 0) this.layer.children[number].focus();
    this.element.setPointerCapture(event.pointerId);
    const move = (now) => {
      const box = shape(before[target], start, this.place(now), this);
      if (box) this.put(target, box);
    };
    const finish = (now) => {
      this.element.removeEventListener('pointermove', move);
      for (const kind of ['pointerup', 'pointercancel']) this.element.removeEventListener(kind, finish);
      const far = Math.max(Math.abs(now.clientX - event.clientX), Math.abs(now.clientY - event.clientY)) >= SMALLEST;
      if (now.type === 'pointercancel' || (!far && number < 0)) {
        if (this.boxes.length !== before.length) this.replace(before);
      }
    };
    this.element.addEventListener('pointermove', move);
    for (const kind of ['pointerup', 'pointercancel']) this.element.addEventListener(kind, finish);
  }

  key(event) {
    const number = this.numberOf(event.target), step = KEYS[event.key];
    if (event.key === 'Delete' || event.key === 'Backspace') {
      this.remove(number);
      (this.layer.children[this.selected] ?? this.element).focus();
    } else if (step) {
      const size = Math.max(1, Math.round(Math.max(this.width, this.height) / 100)), by = step.map((side) => side * size);
      this.put(number, (event.shiftKey ? resized : moved)(this.boxes[number], [0, 0], by, this));
      this.layer.children[number].focus();
    } else return;
    event.preventDefault();
  }

  render() {
    while (this.layer.children.length > this.boxes.length) this.layer.lastChild.remove();
    while (this.layer.children.length < this.boxes.length) {
      const box = document.createElement('button');
      box.type = 'button';
      box.className = 'box';
      box.innerHTML = '<b></b><span class="handle"></span>';
      this.layer.append(box);
    }
    this.boxes.forEach(([x1, y1, x2, y2], number) => {
      const element = this.layer.children[number];
      const share = { left: x1 / this.width, top: y1 / this.height, width: (x2 - x1) / this.width, height: (y2 - y1) / this.height };
      for (const [side, value] of Object.entries(share)) element.style[side] = `${100 * value}%`;
      element.dataset.box = [x1, y1, x2, y2];
      element.firstChild.textContent = number + 1;
      element.ariaLabel = `Box ${number + 1}, ${x2 - x1} by ${y2 - y1} pixels, ${x1} from the left, ${y1} from the top. `
        + 'Arrow keys move it, with Shift they change its size, Delete removes it.';
    });
    this.mark();
  }

  mark() {
    [...this.layer.children].forEach((box, number) => box.classList.toggle('selected', number === this.selected));
  }
}

function drawn(_, start, end) {
  const [x1, x2] = [start[0], end[0]].sort((a, b) => a - b), [y1, y2] = [start[1], end[1]].sort((a, b) => a - b);
  return x1 < x2 && y1 < y2 ? [x1, y1, x2, y2] : null;
}

function moved([x1, y1, x2, y2], start, end, { width, height }) {
  const right = Math.max(-x1, Math.min(width - x2, end[0] - start[0]));
  const down = Math.max(-y1, Math.min(height - y2, end[1] - start[1]));
  return [x1 + right, y1 + down, x2 + right, y2 + down];
}

function resized([x1, y1, x2, y2], start, end, { width, height }) {
  const right = Math.max(x1 + 2, Math.min(width, x2 + end[0] - start[0]));
  return [x1, y1, right, Math.max(y1 + 2, Math.min(height, y2 + end[1] - start[1]))];
}
