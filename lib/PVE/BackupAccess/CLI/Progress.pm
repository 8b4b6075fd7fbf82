package PVE::BackupAccess::CLI::Progress;

# Shows the progress of a copy on standard error, like the log: as a bar on a terminal, otherwise as
# a line every few seconds.

use v5.36;

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::CLI::Output qw(one_line say_error share);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Try qw(attempt_any);

my $seconds_between = 10;    # lines of progress

# With $is_quiet, only warnings are shown.
sub new ($class, $is_quiet = 0) {
    my $has_bar = !$is_quiet && -t STDERR && !attempt_any { require Term::ProgressBar };
    return bless({ 'has bar' => $has_bar, 'is quiet' => $is_quiet, name => '' }, $class);
}

sub begin ($self, $name) {
    $self->end;
    $self->@{qw(name began told)} = ($name, now(), now());
    return;
}

# The total may grow: when the next of several disks begins. Then, and after a line of the log, this is a new bar.
sub show_bar ($self, $done, $total) {
    $self->end_bar if $done >= $total || $total != ($self->{total} // 0);
    return if $done >= $total;
    my $name = one_line($self->label($done));
    $self->{total} = $total;
    my $bar = $self->{bar} //= $self->new_bar($name, $total);
    $bar->name($name);
    $bar->update($done);
    return;
}

# Its estimate is computed from the beginning of the copy.
sub new_bar ($self, $name, $total) {
    my $bar = Term::ProgressBar->new(
        {
            name => $name,
            count => $total,
            ETA => 'linear',
            remove => 1,
            fh => \*STDERR,
            silent => 0,
        }
    );
    $bar->minor(0);
    $bar->start($bar->start - (now() - $self->{began}));
    return $bar;
}

# The label has a constant width, because the layout of the bar is computed once.
sub label ($self, $done) {
    my $seconds = now() - $self->{began};
    my $rate = $seconds > 0.2 ? bytes(int($done / $seconds)) . '/s' : '';
    return sprintf('%s %12s', $self->{name}, $rate);
}

# Takes the number of bytes done. May be called at any rate.
sub update ($self, $name, $done, $total) {
    return if $self->{'is quiet'};
    $self->begin($name) if $name ne $self->{name};
    return $self->show_bar($done, $total) if $self->{'has bar'};
    return if now() - $self->{told} < $seconds_between;
    $self->{told} = now();
    my $label = $self->label($done) =~ s/\A\Q$name\E\s*//r;
    say_error(
        sprintf(
            '%s: %s of %s (%s) %s',
            $name, bytes($done), bytes($total), share($done, $total), $label
        )
    );
    return;
}

# Prints a line of the log, above the bar.
sub tell ($self, $line) {
    $self->warn($line) if !$self->{'is quiet'};
    return;
}

sub warn ($self, $line) {
    $self->end_bar;
    say_error($line);
    return;
}

sub end_bar ($self) {
    print {*STDERR} "\r\e[K" if delete($self->{bar});
    return;
}

sub end ($self) {
    $self->end_bar;
    $self->{name} = '';
    return;
}

1;
