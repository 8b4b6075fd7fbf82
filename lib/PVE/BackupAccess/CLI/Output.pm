package PVE::BackupAccess::CLI::Output;

# The command's output: text, tables, JSON.

use v5.36;

use Errno qw(EINTR);
use Exporter qw(import);
use JSON::PP ();
use List::Util qw(max);

our @EXPORT_OK = qw(
    advice_on columns is_utf8_terminal one_line parse_bytes read_file say_error say_json say_out say_table
    share write_all write_file write_out
);

# Text is encoded; bytes, such as the name of a file, are printed unchanged.
my sub bytes_of ($text) {
    utf8::encode($text) if utf8::is_utf8($text);
    return $text;
}

# Names from QEMU, archives and providers must not end a line or control a terminal, so this removes
# the control characters of ASCII and, in UTF-8, of Latin 1.
sub one_line ($text) {
    return bytes_of($text) =~ s/[\x00-\x1f\x7f]|\xc2[\x80-\x9f]/ /gr;
}

# A write error is reported at once, not after hours of work.
sub write_out (@parts) {
    print {*STDOUT} map { bytes_of($_) } @parts or die "cannot write to standard output: $!\n";
    return;
}

# The same for any handle, at once and without Perl's buffer: Perl would try to flush that again at
# its exit.
sub write_all ($fh, $where, $data) {
    for (my $at = 0; $at < length($data);) {
        my $written = syswrite($fh, $data, length($data) - $at, $at);
        die "cannot write to $where: $!\n" if !defined($written) && $! != EINTR;
        $at += $written // 0;
    }
    return;
}

sub say_out (@lines) {
    write_out(map { one_line($_) . "\n" } @lines);
    return;
}

sub say_error (@lines) {
    print {*STDERR} map { one_line($_ =~ s/\s+\z//r) . "\n" } @lines;
    return;
}

# What the user can do about an error of any command, or undef.
sub advice_on ($error) {
    return
        'This file system is mounted read-only: remount it writable. If an error made it read-only, the kernel log says which.'
        if $error =~ m/Read-only file system/;
    return undef;
}

sub say_json ($data) {
    write_out(JSON::PP->new->utf8->canonical->pretty->encode($data));
    return;
}

# Prints rows of cells; the first row is the heading. The columns @right are right-aligned.
sub say_table ($rows, @right) {
    my %is_right = map { $_ => 1 } @right;
    my @widths = map {
        my $column = $_;
        max(map { length($_->[$column]) } $rows->@*)
    } 0 .. $rows->[0]->$#*;
    for my $row ($rows->@*) {
        my @cells = map { sprintf($is_right{$_} ? '%*s' : '%-*s', $widths[$_], $row->[$_]) }
            0 .. $row->$#*;
        say_out(join('  ', @cells) =~ s/\s+\z//r);
    }
    return;
}

# A share in per cent. Only an empty part is shown as 0 %, and only the whole as 100 %.
sub share ($part, $whole) {
    return '0 %' if !$part;
    my $percent = 100 * $part / $whole;
    return '< 0.01 %' if $percent < 0.01;
    return '> 99.99 %' if $percent > 99.99 && $part < $whole;
    return sprintf($percent < 10 ? '%.2f' : '%.1f', $percent) =~ s/[.]?0+\z//r . ' %';
}

# Parses a number of bytes as people type it: 500M, 1.5 GiB, 1048576. Returns undef if it is not
# one.
sub parse_bytes ($text) {
    my ($number, $unit) = $text =~ m/\A([0-9]+(?:[.][0-9]+)?)\s*([KMGT]?)(?:i?B)?\z/i or return;
    return int($number * 1024**index('_KMGT', uc($unit) || '_'));
}

# ---- files ----

sub read_file ($path, $length = undef) {
    open(my $fh, '<:raw', $path) or die "cannot read $path: $!\n";
    local $/ = defined($length) ? \$length : undef;
    return scalar(<$fh>) // '';
}

sub write_file ($path, $content) {
    open(my $fh, '>:raw', $path) or die "cannot write $path: $!\n";
    print {$fh} $content and close($fh) or die "cannot write $path: $!\n";
    return;
}

# ---- the terminal ----

sub columns () {
    return $1 if ($ENV{COLUMNS} // '') =~ m/\A([1-9][0-9]{0,3})\z/;
    return 80 if !-t STDOUT;
    require PVE::BackupAccess::Try;
    my $columns;
    PVE::BackupAccess::Try::attempt_any(
        sub {
            require Term::ReadKey;
            ($columns) = Term::ReadKey::GetTerminalSize(\*STDOUT);
        }
    );
    return $columns || 80;
}

sub is_utf8_terminal () {
    require I18N::Langinfo;
    require POSIX;
    POSIX::setlocale(POSIX::LC_CTYPE(), '');
    return I18N::Langinfo::langinfo(I18N::Langinfo::CODESET()) =~ m/\Autf-?8\z/i;
}

1;
